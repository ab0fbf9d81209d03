"""Named endpoints of the page for programs (`gradio_client`); all others are for the page itself."""

from typing import Any

import gradio as gr

from page.asking import Caller, Shared, answer
from page.chat import typed_files
from page.texts import say


def add_endpoints(shared: Shared) -> None:
    """Add `/answer` and `/checkpoints`; inside `gr.Blocks`."""

    def answer_one(
        request: gr.Request,
        photos: list[dict[str, Any]],
        question: str,
        checkpoint: str = "",
        longest: int = 0,
        temperature: float = 0.0,
        system: str = "",
    ) -> str:
        """Answer a question about photos.

        Args:
            photos: files, as `gradio_client.handle_file` makes them.
            checkpoint: of `/checkpoints`; empty: the one that the page began with.
            longest: most tokens of the answer; 0: as the page.
            temperature: 0: always the likeliest token.
            system: system message; empty: that of the training.
        """
        session = request.session_hash or ""
        # also of a question that is refused, or it would stay when the session ends
        shared.files.hold(session, *typed_files({"files": photos}))
        if not isinstance(question, str) or not question.strip():
            raise gr.Error(say("en", "no_question"), print_exception=False)
        settings = {"temperature": temperature, "system": system}
        settings |= {"max_new_tokens": longest} if longest else {}
        caller = Caller(session, "en", checkpoint or shared.engines.first, settings)
        with shared.work(session) as work:
            if work is None:
                raise gr.Error(say("en", "busy"), print_exception=False)
            try:
                *_, step = answer(shared, caller, work, [{"role": "user", "content": question.strip()}], photos)
            finally:
                shared.files.release(session)
        if step.failed:
            raise gr.Error(step.failed[-1]["content"], print_exception=False)
        return step.history[-1]["content"]

    def checkpoints() -> list[str]:
        """Return the names of the checkpoints that can be asked."""
        return [name for _, name in shared.engines.names()]

    gr.api(answer_one, api_name="answer", concurrency_limit=None)
    gr.api(checkpoints, api_name="checkpoints")
