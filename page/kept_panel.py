"""Earlier chats that the browser keeps, and the download of the chat."""

from typing import Any

import gradio as gr

from errors import UserError
from page.asking import PRIVATE, Shared, Step
from page.chat import answered, checked, files_of, photos_of, typed_files
from page.chat_tab import ChatTab, Updates
from page.kept import opened, zipped
from page.texts import label, language_of
from page.uploads import NotUploadedError, store


class KeptPanel:
    """Components and handlers; made inside `gr.Blocks`."""

    def __init__(self, chat: ChatTab, shared: Shared) -> None:
        self._chat, self._shared = chat, shared
        with gr.Accordion(label("kept"), open=False, elem_id="kept"):
            self.list = gr.Dropdown([], label=label("kept"), info=label("kept_info"), elem_id="kept-list")
            with gr.Row():
                forget = gr.Button(label("forget"), size="sm", min_width=80)
                forget_all = gr.Button(label("forget_all"), size="sm", min_width=80, elem_id="forget-all")
        self._file = gr.File(visible="hidden")
        forget.click(None, self.list, self.list, js="id => vqa.forget(id)")
        forget_all.click(None, None, self.list, js="() => vqa.forget(null)")

    def connect(self, page: gr.Blocks, checkpoint: Any) -> list[Any]:
        """Keep the chat after each answer; open chats, also the one before a reload; return the events that open."""
        chat = self._chat
        chat.kept.change(None, chat.kept, self.list, js="chat => vqa.keep(chat)")
        # the browser sends the stored chat in place of its id
        loaded = page.load(None, None, self.list, js="() => vqa.choices(vqa.kept())")
        openings = [
            listener(
                self.on_open, [self.list, chat.chat_id, chat.question], chat.outputs,
                js="(id, ...others) => [vqa.open(id), ...others]", **PRIVATE,
            )
            for listener in (self.list.input, loaded.then)
        ]  # fmt: skip
        chat.download.click(self.on_download, [chat.messages, checkpoint], [self._file, chat.status], **PRIVATE).then(
            None, self._file, None, js="file => vqa.download(file)"
        )
        return openings

    def on_open(self, request: gr.Request, stored: Any, open_id: Any, payload: Any) -> Updates:
        """Show a stored chat; photos that wait in the question box stay."""
        # Nothing to open at the first load. Gradio sends a choice twice; the second, when it comes after the next
        # question, would take that back.
        if not stored or (isinstance(stored, dict) and stored.get("id") == open_id):
            return {self._chat.status: gr.update()}
        if self._chat.is_busy(request):
            return self._chat.complain(request, "busy")
        try:
            history, chat_id = opened(stored, self._shared.folder)
        except UserError:
            return self._chat.complain(request, "bad_kept")
        session = request.session_hash or ""
        self._shared.files.hold(session, *files_of(history))
        self._shared.files.release(session, keep=[*files_of(history), *typed_files(payload)])
        step = Step(history, "", busy=False)
        return self._chat.show(step, language_of(request)) | self._chat.closed() | {self._chat.chat_id: chat_id}

    def on_download(self, request: gr.Request, history: Any, name: Any) -> Updates:
        history = answered(history)
        if not history:
            return self._chat.complain(request, "nothing_to_save") | {self._file: None}
        try:
            for photo in photos_of(history):
                checked({"path": photo.path}, self._shared.folder)
        except NotUploadedError:
            return self._chat.complain(request, "gone") | {self._file: None}
        path = store(self._shared.folder, zipped(history, str(name)), "chat.zip")
        self._shared.files.hold(request.session_hash or "", path)
        return {self._file: path, self._chat.status: ""}
