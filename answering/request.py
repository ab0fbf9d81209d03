"""What goes into the engine and what comes out: requests, rendered prompts, replies. Used by `answer.py`."""

import hashlib
import inspect
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image

from config import Generate
from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message, MessageFormat
from visual.photo import load_image
from visual.region import Box, Region
from visual_plan import VisualPlan

PhotoSource = Image.Image | str | Path | Region
# the model or a stop string ended the answer; the longest answer or the context was full; the stream was closed
FinishReason = Literal["stop", "length", "cancelled"]


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
    """A whole answer, or what a cancelled one came to. Replies are equal if the answers are, made in any way.

    Attributes:
        text: without a stop string.
        tokens_in: tokens of the prompt.
        tokens_out: all tokens that were chosen, without the end token.
        tokens_reused: tokens of the prompt whose keys and values were there from earlier answers.
        seconds_to_first_token: decoding the photos and waiting for other answers included.
        tokens_per_second: after the first token; 0 if there is no other.
    """

    text: str
    finish_reason: FinishReason
    tokens_in: int
    tokens_out: int
    tokens_reused: int = field(default=0, compare=False)
    seconds_to_first_token: float = field(default=0.0, compare=False)
    tokens_per_second: float = field(default=0.0, compare=False)


class CancelledError(Exception):
    """Raised in the generator of an answer when its stream is closed; the generator returns its reply so far."""


class ReplyStream(Iterator[str]):
    """The pieces of an answer.

    Attributes:
        reply: the whole answer once the last piece was taken, or after `close` the answer so far; None before that and
            after an error.

    Args:
        pieces: an item for each token, which may be empty.
    """

    def __init__(self, pieces: Generator[str, None, Reply]) -> None:
        self.reply: Reply | None = None
        self._pieces = pieces
        self._closed = False
        self._taking = threading.Lock()  # a generator cannot be closed while another thread runs it

    def __next__(self) -> str:
        with self._taking:
            try:
                while not self._closed:
                    if piece := next(self._pieces):
                        return piece
                self._cancel()
            except StopIteration as end:
                self.reply = self.reply or end.value
            raise StopIteration

    def rest(self) -> Reply:
        """Take the remaining pieces; return the answer."""
        for _ in self:
            pass
        assert self.reply is not None, "the stream ended with an error"
        return self.reply

    def close(self) -> None:
        """End the answer, and wait for the token that another thread is taking. Any thread may call it."""
        self._closed = True
        with self._taking:
            self._cancel()

    def _cancel(self) -> None:
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_CLOSED:
            return
        try:
            self._pieces.throw(CancelledError)
        except StopIteration as end:
            self.reply = end.value
        except CancelledError:  # not begun
            self.reply = Reply("", "cancelled", 0, 0)


class AnyAnswerer(Protocol):
    """What scripts use of `answer.Answerer`, which has a model, and of `remote.RemoteAnswerer`, which asks a server."""

    @property
    def chat(self) -> MessageFormat: ...

    def stream(
        self, image: PhotoSource | None, messages: list[dict[str, Any]], settings: Generate | None = None
    ) -> ReplyStream: ...

    def stream_messages(
        self, photos: Sequence[PhotoSource], messages: list[Message], settings: Generate | None = None
    ) -> ReplyStream: ...

    def answer_many(
        self, requests: Iterable[Request], settings: Generate | None = None, most_tokens: int | None = None
    ) -> Iterator[Reply | UserError]: ...


def on_disk(photo: PhotoSource) -> bool:
    """Whether it is a file or a region of one."""
    return isinstance(photo.photo if isinstance(photo, Region) else photo, str | Path)


def add_region(photos: list[PhotoSource], box: Box) -> None:
    """Add the part of the last photo inside `box`, which a question is about; before, the photos up to the question.

    The whole photo comes before it, so the model sees both: what is around the part, and the part in full size.

    Raises:
        UserError: there is no photo.
    """
    whole = next((photo for photo in reversed(photos) if not isinstance(photo, Region)), None)
    if whole is None:
        raise UserError("a box needs a photo: give the photo with this question or an earlier one")
    photos.append(Region(whole, box))


def read_picture(model: MMultiModal, photo: PhotoSource) -> Picture:
    """Decode a photo; errors as `load_image`."""
    image = load_image(photo)
    content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Picture(image, model.processor.plan(*image.size), content)


def encode_picture(model: MMultiModal, picture: Picture) -> torch.Tensor:
    """Return encoder features (crops, R, Dv) of a photo."""
    return model.encode_image(model.processor.pixels(picture.image, picture.plan).to(model.device))


def make_prompt(
    model: MMultiModal, pictures: list[Picture], messages: list[Message], max_new_tokens: int
) -> OpenPrompt:
    """Render a dialogue.

    Raises:
        UserError: it is longer than the language model's context.
        ValueError: more or fewer positions than pictures.
    """
    chat, plans = model.processor.chat, [picture.plan for picture in pictures]
    ids, _ = chat.render(with_plans(messages, plans))
    context = model.LLM.config.max_position_embeddings
    room = context - len(ids)
    if room < 1:
        raise UserError(
            f"the dialogue has {len(ids)} tokens ({sum(plan.tokens for plan in plans)} of its photos), the language "
            f"model reads {context}: start a new dialogue, or send fewer photos or a shorter question"
        )
    photos = tuple(picture.hash for picture in pictures)
    return OpenPrompt(ids, photos, chat.photo_spans(ids, plans), min(max_new_tokens, room))


def with_plans(messages: list[Message], plans: list[VisualPlan]) -> list[Message]:
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
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:  # compared in C
        return shorter
    return next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
