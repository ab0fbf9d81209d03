"""An answer while it is made. Used by `answer.py`, `batches.py` and `beams.py`."""

from answering.choice import TokenChoice
from answering.request import FinishReason, OpenPrompt, Reply
from config import Generate
from model.model import MMultiModal


class OpenAnswer:
    """Tokens and text of an answer, and its speed.

    Text is held back while its last character is incomplete, or while it may be the start of a stop string.

    Attributes:
        tokens: without the end token.
        reason: why it has ended; None: it has not.
        tokens_reused: see `Reply`.
    """

    def __init__(self, model: MMultiModal, prompt: OpenPrompt, settings: Generate) -> None:
        self.prompt = prompt
        self.choice = TokenChoice(settings, prompt.ids, model.device)
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.tokens_reused = 0
        self._processor, self._stop = model.processor, settings.stop
        self._undecoded: list[int] = []
        self._held = ""  # decoded, and may be the start of a stop string
        self._text = ""  # all that `add` returned
        self._seconds: list[float] = []  # of each token, end token included

    def add(self, token: int, seconds: float) -> str:
        """Add the next token, or an end token, which took `seconds`; return the text that is now certain."""
        self._seconds.append(seconds)
        if token in self._processor.chat.stop_ids:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            self._undecoded.append(token)
            if len(self.tokens) == self.prompt.limit:
                self.reason = "length"
        text = self._processor.tokenizer.decode(
            self._undecoded, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if text.endswith("\ufffd") and self.reason is None:
            return ""
        self._undecoded = []
        piece = self._before_stop(self._held + text)
        self._text += piece
        return piece

    def _before_stop(self, text: str) -> str:
        """Return the part of `text` before a stop string or, as long as more may follow, before the start of one."""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.reason, end = "stop", min(places)
        elif self.reason is None:
            end = len(text) - max((_start_length(text, stop) for stop in self._stop), default=0)
        else:
            end = len(text)
        self._held = text[end:]
        return text[:end]

    def reply(self) -> Reply:
        """Return the answer; before its end, what there is of it as a cancelled one."""
        first, *rest = self._seconds or [0.0]
        return Reply(
            self._text,
            self.reason or "cancelled",
            len(self.prompt.ids),
            len(self.tokens),
            self.tokens_reused,
            first,
            len(rest) / max(sum(rest), 1e-9),  # 0 without a second token
        )


def _start_length(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is the start of `stop`, but not all of it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
