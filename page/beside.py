"""Side by side: the last question of the chat, asked of two checkpoints, or of one with an untrained projector too."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from errors import is_defect
from page.asking import PRIVATE, Shared, decoding, growing, line_of_figures, sent, sentence_of, until_turn
from page.chat import answered, photos_of
from page.chat_tab import ChatTab
from page.checkpoints import UNTRAINED
from page.settings import as_settings
from page.texts import as_markdown, label, language_of, say


class BesidePanel:
    """Two checkpoints to choose, and their answers; only for models that are here."""

    def __init__(self, chat: ChatTab, shared: Shared) -> None:
        self._chat, self._shared = chat, shared
        with gr.Accordion(label("beside"), open=False, visible=shared.engines.has_weights, elem_id="beside"):
            gr.Markdown(label("beside_info"))
            self.names = [gr.Dropdown([], label=label(side), elem_id=f"{side}-name") for side in ("left", "right")]
            with gr.Row():
                self.compare = gr.Button(label("compare"), variant="primary", size="sm", elem_id="compare")
                stop = gr.Button(label("stop"), size="sm", elem_id="compare-stop")
            self.state = gr.Markdown("", elem_id="beside-state")
            with gr.Row():
                self.answers = [
                    gr.Textbox(label=label(side), interactive=False, lines=3, max_lines=12, min_width=140,
                               elem_id=f"{side}-answer")
                    for side in ("left", "right")
                ]  # fmt: skip
                # the figures of an answer stand below it
            with gr.Row():
                self.figures = [gr.Markdown("", elem_id=f"{side}-figures") for side in ("left", "right")]
        stop.click(chat.on_stop, None, None, **PRIVATE)

    def connect(self, page: gr.Blocks, settings: list[Any]) -> None:
        page.load(self._choices, None, self.names, **PRIVATE)
        outputs = [self.state, *self.answers, *self.figures]
        inputs = [self._chat.messages, *self.names, *settings]
        self.compare.click(self.on_compare, inputs, outputs, **PRIVATE)

    def _choices(self, request: gr.Request) -> list[Any]:
        names, first = self._shared.engines.names(), self._shared.engines.first
        untrained_name = say(language_of(request), "untrained")
        untrained = [(f"{name} · {untrained_name}", f"{name}|{UNTRAINED}") for _, name in names]
        other = next((name for _, name in names if name != first), f"{first}|{UNTRAINED}")
        return [gr.update(choices=[*names, *untrained], value=value) for value in (first, other)]

    def on_compare(self, request: gr.Request, history, left, right, *settings) -> Iterator[list[Any]]:
        language, history = language_of(request), answered(history)
        shown, figures = ["", ""], ["", ""]
        with self._shared.work(request.session_hash or "") as work:
            if work is None or not history:
                yield [say(language, "busy" if history else "nothing_to_look_at"), *shown, *figures]
                return
            names, values = [str(left), str(right)], as_settings(settings)
            try:
                for line in self._steps(history, names, values, work, shown, figures, language):
                    yield [as_markdown(line), *shown, *figures]
                yield [say(language, "stopped") if work.stopped else "", *shown, *figures]
            except Exception as error:
                yield [as_markdown(sentence_of(error, photos_of(history), language)), *shown, *figures]
                if is_defect(error):
                    raise

    def _steps(self, history, names, values, work, shown, figures, language) -> Iterator[str]:
        """Fill `shown` and `figures`; yield lines for the state whenever they have changed."""
        settings, engines = decoding(self._shared.generate, values), self._shared.engines
        with self._shared.line.place() as place:
            yield from until_turn(self._shared, place, work, language, *(name for name in names if "|" not in name))
            if work.stopped:
                return
            for side, engine in enumerate(engines.get(*names)):
                if work.stopped:
                    return
                messages = sent(history[:-1], engine, self._shared.folder, values["system"])
                stream = engine.stream(None, messages, settings)
                for text in growing(stream, work):
                    shown[side] = text
                    yield say(language, "working")
                assert stream.reply is not None
                figures[side] = line_of_figures(stream.reply, engine, language)
