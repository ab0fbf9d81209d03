"""Where the model looked for the last answer, and the part of a photo that the next question is about."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from answering.answer import Answerer
from answering.heat_picture import draw_heatmaps
from answering.heatmap import answer_words
from errors import UserError, is_defect
from page.asking import PRIVATE, Shared, Work, decoded, sent, sentence_of, until_turn
from page.chat import History, answered, photos_of, typed
from page.chat_tab import ChatTab
from page.settings import as_settings
from page.texts import TEXTS, as_markdown, label, language_of, say
from page.uploads import NotUploadedError, uploaded_photo
from visual.transform import load_image

WHOLE = -1  # the choice that is no word


class LookingPanel:
    """Words of the last answer, and the map for one of them; only for models that are here."""

    def __init__(self, chat: ChatTab, shared: Shared) -> None:
        self._chat, self._shared = chat, shared
        with gr.Accordion(label("looked"), open=False, visible=shared.engines.has_weights, elem_id="looking"):
            gr.Markdown(label("looked_info"))
            whole = (label("whole_answer"), WHOLE)
            self.words = gr.Radio([whole], value=WHOLE, label=label("words"), elem_id="words")
            methods = [(label(name), name) for name in ("gradient", "attention")]
            self.method = gr.Radio(methods, value="gradient", label=label("method"), elem_id="method")
            self.look = gr.Button(label("look"), size="sm", elem_id="look")
            self.state = gr.Markdown("", elem_id="looking-state")
            self.map = gr.Image(
                show_label=False, label=label("map"), interactive=False, visible=False, alt_text="", elem_id="map",
                buttons=["fullscreen"], format="png",
            )  # fmt: skip

    def connect(self, changes: list[Any], checkpoint: Any, settings: list[Any]) -> None:
        """Connect the panel; `changes` are the events after which the chat may have another last answer."""
        chat = self._chat
        for event in changes:
            event.then(self.on_chat, [chat.messages, checkpoint], [self.words, self.map], **PRIVATE)
        inputs = [chat.messages, checkpoint, self.words, self.method, *settings]
        events = [self.look.click, self.words.input, self.method.input]
        gr.on(events, self.on_look, inputs, [self.map, self.state], trigger_mode="always_last", **PRIVATE)

    def on_chat(self, history: Any, name: Any) -> tuple[Any, Any]:
        """Offer the words of the last answer."""
        history, engine = answered(history), self._shared.engines.loaded(str(name))
        words = []
        if history and isinstance(engine, Answerer):  # else only the whole answer, until the checkpoint is loaded
            words = answer_words(engine.model, history[-1]["content"])
        choices = [(label("whole_answer"), WHOLE), *((word.text, number) for number, word in enumerate(words))]
        return gr.update(choices=choices, value=WHOLE), gr.update(visible=False, value=None)

    def on_look(self, request: gr.Request, history, name, chosen, method, *settings) -> Iterator[tuple[Any, str]]:
        language, history = language_of(request), answered(history)
        if not history:
            yield gr.update(), say(language, "nothing_to_look_at")
            return
        try:
            with self._shared.line.place() as place:
                for sentence in until_turn(self._shared, place, Work(), language):
                    yield gr.update(), sentence
                yield gr.update(), say(language, "working")
                picture = self._draw(history, str(name), chosen, method, as_settings(settings)["system"])
            yield gr.update(value=picture, visible=True, alt_text=say(language, "map")), ""
        except Exception as error:
            yield gr.update(visible=False), as_markdown(sentence_of(error, photos_of(history), language))
            if is_defect(error):
                raise

    def _draw(self, history: History, name: str, chosen: Any, method: Any, system: Any) -> Any:
        (engine,) = self._shared.engines.get(name)
        assert isinstance(engine, Answerer), "the panel is hidden for servers"
        messages, answer = sent(history[:-1], engine, self._shared.folder, system), history[-1]["content"]
        words = answer_words(engine.model, answer)
        whole = not isinstance(chosen, int) or not 0 <= chosen < len(words)
        span = None if whole else (words[chosen].start, words[chosen].end)
        maps = engine.look(None, messages, answer, span, method)
        photos = [load_image(photo) for photo in engine.request(None, messages).photos]
        return draw_heatmaps(maps, photos)


class PartPanel:
    """The last photo, to draw a box on (`browser.js`), and the box as text."""

    def __init__(self) -> None:
        with gr.Accordion(label("part"), open=False, elem_id="part-panel"):
            gr.Markdown(label("part_info"))
            self.photo = gr.Image(
                show_label=False, label=label("part"), interactive=False, buttons=[], height=280, elem_id="part",
                placeholder="", alt_text=TEXTS["part_of_photo"][0],
            )  # fmt: skip
            self.box = gr.Textbox("", label=label("box"), placeholder="0.25,0.0,0.5,1.0", max_lines=1, elem_id="box")
            remove = gr.Button(label("no_box"), size="sm", elem_id="no-box")
            remove.click(lambda: "", None, self.box, api_visibility="private")
        self.box.change(None, None, None, js="() => vqa.show_box()")

    def connect(self, changes: list[Any], chat: ChatTab, shared: Shared) -> None:
        """Follow the last photo of question box and chat; ask whether a new photo begins a new chat."""

        def on_photos(request: gr.Request, payload: Any, history: Any, place: Any, shown: Any) -> tuple[Any, Any]:
            history, (_, uploads) = answered(history), typed(payload)
            editing = isinstance(place, int) and place >= 0
            earlier = photos_of(history[:place] if editing else history)
            try:
                new = [str(uploaded_photo(upload, shared.folder)) for upload in uploads]
            except NotUploadedError:  # asking says so
                new = []
            shared.files.hold(request.session_hash or "", *new)
            last = [*(photo.path for photo in earlier), *new][-1:]
            before = shown.get("path") if isinstance(shown, dict) else None
            language = language_of(request)
            photo = gr.update(value=_shown(last), alt_text=say(language, "part_of_photo"))
            ask_where = bool(new and earlier) and not editing
            return gr.update() if last == [before] else photo, gr.update(visible=ask_where)

        # the browser compares, so that typing asks the server nothing
        attached = gr.Textbox(visible="hidden")
        script = "box => [(box.files || []).map(file => file.path).join('\\n')]"
        chat.question.change(None, chat.question, attached, js=script)
        for listener in (attached.change, *(event.then for event in changes)):
            listener(
                on_photos, [chat.question, chat.messages, chat.editing, self.photo], [self.photo, chat.where], **PRIVATE
            )


def _shown(paths: list[str]) -> str | None:
    """Return the photo if it can be read."""
    try:
        return paths[0] if paths and decoded(paths[0]) else None
    except UserError:
        return None
