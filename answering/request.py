"""What goes into the engine and what comes out: requests, rendered prompts, replies. Used by `answer.py`."""

import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from transformers import PreTrainedTokenizerBase

from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message
from visual.photo import load_image
from visual_plan import VisualPlan

PhotoSource = Image.Image | str | Path
FinishReason = Literal["stop", "length"]  # the model ended the answer, or the longest answer or the context was full


class Request(NamedTuple):
    """Photos, and messages with their positions in reading order; the last message is the user's.

    The plans in the messages only mark positions; the plan used for a photo depends on its size.
    """

    photos: Sequence[PhotoSource]
    messages: list[Message]


class Picture(NamedTuple):
    """A decoded photo, and what its place in a prompt depends on."""

    image: Image.Image
    plan: VisualPlan
    hash: str


@dataclass(frozen=True)
class OpenPrompt:
    """A rendered dialogue whose answer is open.

    Attributes:
        ids: with the placeholders of the photos.
        photos: hashes of the photos, in reading order.
        spans: start and end of each photo in `ids`.
        limit: most tokens of the answer, by settings and context.
    """

    ids: list[int]
    photos: tuple[str, ...]
    spans: list[tuple[int, int]]
    limit: int

    @property
    def photos_end(self) -> int:
        """End of the last photo in `ids`; 0 without photos."""
        return self.spans[-1][1] if self.spans else 0


@dataclass(frozen=True)
class Reply:
    """A whole answer; `tokens_out` is without the end token."""

    text: str
    finish_reason: FinishReason
    tokens_in: int
    tokens_out: int


class ReplyStream(Iterator[str]):
    """The pieces of an answer; closing it stops the work.

    Attributes:
        reply: the whole answer, once the last piece was taken; None before, and after an error or `close`.
    """

    def __init__(self, pieces: Generator[str, None, Reply]) -> None:
        self._pieces = pieces
        self.reply: Reply | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.reply = self.reply or end.value
            raise

    def rest(self) -> Reply:
        """Take the remaining pieces; return the whole answer."""
        for _ in self:
            pass
        assert self.reply is not None, "the stream was closed before its end"
        return self.reply

    def close(self) -> None:
        self._pieces.close()


def read_picture(model: MMultiModal, photo: PhotoSource) -> Picture:
    """Decode a photo; errors as `load_image`."""
    image = load_image(photo)
    content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Picture(image, model.processor.plan(*image.size), content)


def make_prompt(
    model: MMultiModal, pictures: list[Picture], messages: list[Message], max_new_tokens: int
) -> OpenPrompt:
    """Render a dialogue.

    Raises:
        UserError: it is longer than the language model's context.
        ValueError: more or fewer positions than pictures.
    """
    chat, plans = model.processor.chat, [picture.plan for picture in pictures]
    ids, _ = chat.render(_with_plans(messages, plans))
    context = model.LLM.config.max_position_embeddings
    room = context - len(ids)
    if room < 1:
        raise UserError(
            f"the dialogue has {len(ids)} tokens ({sum(plan.tokens for plan in plans)} of its photos), the language "
            f"model reads {context}: start a new dialogue, or send fewer photos or a shorter question"
        )
    photos = tuple(picture.hash for picture in pictures)
    return OpenPrompt(ids, photos, chat.photo_spans(ids, plans), min(max_new_tokens, room))


def _with_plans(messages: list[Message], plans: list[VisualPlan]) -> list[Message]:
    """Return the messages with `plans` at the positions of the photos, in reading order.

    Raises:
        ValueError: more or fewer positions than plans.
    """
    places = sum(isinstance(part, VisualPlan) for message in messages for part in message.parts)
    if places != len(plans):
        raise ValueError(f"the messages have places for {places} photos, {len(plans)} are given")
    rest = iter(plans)
    return [
        Message(message.role, tuple(part if isinstance(part, str) else next(rest) for part in message.parts))
        for message in messages
    ]


def common_length(first: Sequence, second: Sequence) -> int:
    """Number of leading items that are equal."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens one by one; tokens that end within a character are kept until it is complete."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text and not text.endswith("\ufffd"):
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
