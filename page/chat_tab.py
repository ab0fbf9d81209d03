"""The chat of the page: its components, and what its buttons do."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from page.asking import PRIVATE, Caller, Shared, Step, Work, answer
from page.chat import History, answered, as_shown, as_upload, in_box, photos_of, typed, typed_files
from page.kept import to_keep
from page.settings import as_settings
from page.texts import as_markdown, label, language_of, say

Updates = dict[Any, Any]  # component → its new value
NONE = -1  # no question is edited
# in seconds: the browser may apply several updates at once, of which the last one counts, also where it leaves a
# component as it was; so all early updates of an answer empty the question box. The last one comes twice, and would
# replace a question that is typed meanwhile; so it leaves the box as it is, and comes later than these.
SETTLING = 0.3


class ChatTab:
    """Components and handlers of the chat; made inside `gr.Blocks`.

    Attributes:
        messages: state: `History` of the session; the chat also shows failed questions.
        chat_id: state: of the chat in the browser's storage; empty before its first answer.
        kept: what the browser stores; it changes together with the last words of an answer, so that no reload comes
            between them.
        waiting: buttons that wait for the end of an answer, from its first update to `on_ended`.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.messages, self.chat_id, self.kept = gr.State([]), gr.State(""), gr.JSON(visible="hidden")
        self.shown = gr.Chatbot(
            label=label("chat"),
            show_label=False,  # would lie over the messages
            height=480,
            elem_id="chat",
            placeholder=label("hello"),
            buttons=["copy", "copy_all"],
            render_markdown=False,
            latex_delimiters=[],
        )
        self.status = gr.Markdown("", elem_id="status")
        # Gradio's own editing fails for questions with photos
        self.editing = gr.Dropdown(
            [(label("editing_none"), NONE)], value=NONE, label=label("editing"), visible=False, elem_id="editing"
        )
        self.where = gr.Radio(
            [(label("where_add"), "add"), (label("where_new"), "new")],
            value="add",
            label=label("where"),
            visible=False,
            elem_id="where",
        )
        with gr.Row(equal_height=False):
            self.question = gr.MultimodalTextbox(
                label=label("question"),
                show_label=False,
                container=False,
                placeholder=label("question_hint"),
                file_count="multiple",
                file_types=["image"],
                lines=1,
                max_lines=4,
                max_plain_text_length=2**31,  # a longer text would be pasted as a file
                submit_btn=False,
                scale=5,
                min_width=240,
                elem_id="question",
            )
            self.ask = gr.Button(label("ask"), variant="primary", scale=1, min_width=100, elem_id="ask")
        with gr.Row(elem_id="buttons"):
            self.stop = gr.Button(label("stop"), interactive=False, min_width=80, elem_id="stop")
            self.again = gr.Button(label("again"), min_width=80, elem_id="again")
            self.edit = gr.Button(label("edit"), min_width=80, elem_id="edit")
            self.clear = gr.Button(label("clear"), min_width=80, elem_id="clear")
            self.download = gr.Button(label("download"), min_width=80, elem_id="download")
        self.waiting = [self.ask, self.again, self.edit, self.clear]
        self._held: Updates = dict.fromkeys(self.waiting, gr.update(interactive=False))

    def connect(self, checkpoint: Any, settings: list[Any], box: Any) -> list[Any]:
        """Connect the buttons; return the events after which the chat has another last answer.

        Args:
            checkpoint, settings: of `page/settings.py`.
            box: text of the box in the last photo.
        """
        self.box = box
        self.outputs = [
            self.messages, self.chat_id, self.shown, self.status, self.question, self.where, self.ask, self.stop,
            self.again, self.edit, self.clear, self.editing, box, self.kept,
        ]  # fmt: skip
        how = [checkpoint, *settings]
        asking = gr.on(
            [self.ask.click, self.question.submit], self.on_ask,
            [self.messages, self.chat_id, self.question, self.where, self.editing, box, *how], self.outputs,
            api_name="on_ask", **PRIVATE | {"api_visibility": "undocumented"},
        )  # fmt: skip
        again = self.again.click(self.on_again, [self.messages, self.chat_id, *how], self.outputs, **PRIVATE)
        # not with the last words of an answer: the browser drops a click that comes before their event has ended
        for event in (asking, again):
            for ended in (event.then, event.failure):  # Gradio's page does not do `then` after an exception
                # multiple: else it would be dropped itself while the end of an earlier answer is not done with
                ended(self.on_ended, None, self.waiting, trigger_mode="multiple", **PRIVATE)
        self.edit.click(self.on_edit, self.messages, self.outputs, **PRIVATE)
        # not `input`, which one choice sends twice: the second answer would come over what is typed by then
        self.editing.select(self.on_choose, [self.messages, self.editing], self.outputs, **PRIVATE)
        self.stop.click(self.on_stop, None, None, **PRIVATE)
        cleared = gr.on([self.clear.click, self.shown.clear], self.on_clear, self.question, self.outputs, **PRIVATE)
        cleared.then(None, js="() => vqa.current('')")
        return [asking, again, cleared]

    def show(self, step: Step, language: str) -> Updates:
        """Return the updates for a step of an answer, without those of the question box."""
        return {
            self.messages: step.history,
            self.shown: as_shown([*step.history, *step.failed], language),
            self.status: as_markdown(step.line),
            self.stop: gr.update(interactive=step.busy),
        }

    def complain(self, request: gr.Request, key: str) -> Updates:
        """Return the update that shows a sentence."""
        sentence = say(language_of(request), key)
        gr.Warning(sentence)
        return {self.status: sentence}

    def is_busy(self, request: gr.Request) -> bool:
        return request.session_hash in self._shared.running

    def closed(self) -> Updates:
        """Return the updates that end all that concerns the next question only."""
        hidden = {self.where: gr.update(visible=False, value="add"), self.box: ""}
        return hidden | {self.editing: gr.update(visible=False, value=NONE)}

    def on_ask(
        self, request: gr.Request, history, chat_id, payload, where, place, box_text, name, *values
    ) -> Iterator[Updates]:
        history, (text, uploads) = answered(history), typed(payload)
        editing = _is_question(place, history)
        before = history[:place] if editing else history
        session = request.session_hash or ""
        # also of a question that is refused, or it would stay when the session ends
        self._shared.files.hold(session, *typed_files(payload))
        with self._shared.work(session) as work:
            if work is None:
                yield self.complain(request, "busy")
                return
            if not text or not (uploads or photos_of(before)):
                yield self.complain(request, "no_question" if uploads or photos_of(before) else "no_photo")
                return
            emptied = self.closed() | self._held | {self.question: in_box("")}
            if where == "new" and uploads and before and not editing:
                history, before, chat_id, emptied = [], [], "", emptied | {self.chat_id: ""}
                self._shared.files.release(session, keep=typed_files(payload))
            yield emptied
            box_text = box_text.strip() if isinstance(box_text, str) else ""
            caller = Caller(session, language_of(request), str(name), as_settings(values), box_text)
            asked = [*before, {"role": "user", "content": text}]
            settled = time.monotonic() + SETTLING
            for updates in self._run(caller, work, chat_id, history, asked, uploads):
                if self.kept in updates:  # the last one
                    time.sleep(max(0.0, settled - time.monotonic()))
                yield emptied | updates if time.monotonic() < settled else updates

    def on_ended(self, request: gr.Request) -> list[Any]:
        """Let `waiting` be pressed again, if no other answer is being written."""
        return [gr.update(interactive=not self.is_busy(request)) for _ in self.waiting]

    def on_again(self, request: gr.Request, history, chat_id, name, *values) -> Iterator[Updates]:
        history, settings = answered(history), as_settings(values)
        with self._shared.work(request.session_hash or "") as work:
            if work is None or not history:
                yield self.complain(request, "busy" if history else "nothing_to_repeat")
                return
            if settings["temperature"] == 0:
                gr.Info(say(language_of(request), "same_answer"))
            settings["seed"] = time.time_ns() % 2**31
            question, uploads = history[-2], [as_upload(photo) for photo in history[-2]["photos"]]
            caller = Caller(request.session_hash or "", language_of(request), str(name), settings, _box_text(question))
            asked = [*history[:-2], {"role": "user", "content": question["content"]}]
            yield from self._run(caller, work, chat_id, history, asked, uploads)

    def on_edit(self, request: gr.Request, history: Any) -> Updates:
        """Offer the questions of the chat, the last one first of all."""
        history = answered(history)
        if not history:
            return self.complain(request, "nothing_to_repeat")
        questions = [(f"{place // 2 + 1}: {history[place]['content']}", place) for place in range(0, len(history), 2)]
        choices = [*questions, (label("editing_none"), NONE)]
        offered = gr.update(choices=choices, value=len(history) - 2, visible=True)
        return self.on_choose(history, len(history) - 2) | {self.editing: offered}

    def on_choose(self, history: Any, place: Any) -> Updates:
        """Put a question into the box, to be asked in other words."""
        history = answered(history)
        if not _is_question(place, history):
            return self.closed() | {self.question: in_box("")}
        question = history[place]
        return {self.question: in_box(question["content"], question["photos"]), self.box: _box_text(question)}

    def on_stop(self, request: gr.Request) -> None:
        self._shared.stop(request.session_hash or "")

    def on_clear(self, request: gr.Request, payload: Any) -> Updates:
        """Begin a new chat; photos that wait in the question box stay."""
        if self.is_busy(request):
            return self.complain(request, "busy")
        self._shared.files.release(request.session_hash or "", keep=typed_files(payload))
        return self.show(Step([], "", busy=False), language_of(request)) | self.closed() | {self.chat_id: ""}

    def _run(
        self, caller: Caller, work: Work, chat_id: str, whole: History, asked: History, uploads: list[Any]
    ) -> Iterator[Updates]:
        """Answer the last question of `asked`; if it gets no answer, the chat is the `whole` one again."""
        for step in answer(self._shared, caller, work, asked, uploads):
            returned = step.question is not None  # to the question box
            shown = self.show(step._replace(history=whole) if returned else step, caller.language) | self._held
            if returned:
                yield shown | {self.question: step.question, self.box: caller.box}
                time.sleep(SETTLING)
            elif not step.busy:
                chat_id = chat_id or secrets.token_hex(8)
                shown |= {self.chat_id: chat_id, self.kept: to_keep(step.history, chat_id)}
            yield shown


def _is_question(place: Any, history: History) -> bool:
    return isinstance(place, int) and place % 2 == 0 and 0 <= place < len(history)


def _box_text(question: dict[str, Any]) -> str:
    """Return the box of a question as it was typed."""
    return ",".join(map(str, question.get("box", ())))
