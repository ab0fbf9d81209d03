"""Asking an OpenAI-compatible server instead of an own model (`--server URL`); photos travel as data URLs."""

import argparse
import base64
import functools
import io
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from cli import read_key

from PIL import Image
from pydantic import BaseModel, Field

from answering.connection import ServerConnection, ServerGoneError
from answering.request import (
    CancelledError,
    FinishReason,
    PhotoSource,
    Reply,
    ReplyStream,
    Request,
    add_region,
    on_disk,
)
from config import Data, Generate, Gui, Prompt, Section, validated
from config_file import put_in
from errors import UserError, shortened
from qwen.chat import Message, MessageFormat
from visual.photo import load_image, orientation_of
from visual.shard import member_of
from visual_plan import VisualPlan

# Pillow's formats that servers read, with their media types; MPO is JPEG with more than one view
MEDIA_TYPES = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
RECENT_PHOTOS = 4  # whose data URLs are kept for the next question
AT_ONCE = 8  # requests under way; serve.py has room for 17 by default, and servers that batch gain little beyond
# what only some servers know is sent only if it changes anything
EXTENSIONS = ("top_k", "min_p", "repetition_penalty")


class ServerConfig(Section):
    """What is set on this side if a server has the model."""

    data: Data = Field(default_factory=Data)
    generate: Generate = Field(default_factory=Generate)
    gui: Gui = Field(default_factory=Gui)


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Text = _Text()
    delta: _Text = _Text()
    finish_reason: str | None = None


class _Answer(BaseModel):
    """A whole answer, or an event of a stream."""

    choices: list[_Choice]
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class RemoteAnswerer:
    """Answers questions as `Answerer` does, by asking a server.

    Args:
        model: its name; None: the only one that the server has.
        settings: decoding settings if a call gives none. Only fields that were set are sent; the server has defaults of
            its own for the others.

    Attributes:
        chat: makes messages; the server adds a system message and the prefix of questions, if it has them.
        name: of the model.

    Raises:
        UserError: not a URL, or no model is named and the server has not exactly one.
        ServerGoneError: no model is named, and the server cannot tell it.
    """

    def __init__(
        self, url: str, key: str | None = None, model: str | None = None, settings: Generate | None = None
    ) -> None:
        self.chat = MessageFormat(Prompt(), VisualPlan(1))
        self.settings = settings or Generate()
        self._server = ServerConnection(url, key)
        self._data_url = functools.lru_cache(RECENT_PHOTOS)(data_url)
        self.name = model or self._only_model()

    @property
    def url(self) -> str:
        return self._server.url

    def _only_model(self) -> str:
        names = [model.id for model in self._server.fetch(_Models, "GET", "/models").data]
        if len(names) != 1:
            raise UserError(f"{self.url} has {len(names)} models, name one with --model: {shortened(', '.join(names))}")
        return names[0]

    def stream(
        self, image: PhotoSource | None, messages: list[dict[str, Any]], settings: Generate | None = None
    ) -> ReplyStream:
        """As `Answerer.stream`."""
        if not messages or not messages[-1]["content"].strip():
            raise UserError("the question is empty: type one")

        def sent() -> Iterator[dict[str, Any]]:
            photos: list[PhotoSource] = []
            for index, message in enumerate(messages):
                before = len(photos)
                photos.extend(([image] if index == 0 and image is not None else []) + list(message.get("images", ())))
                if message.get("box") is not None:
                    add_region(photos, message["box"])
                yield _message(message["role"], [*map(self._photo, photos[before:]), message["content"]])

        return ReplyStream(self._pieces(sent(), settings))

    def stream_messages(
        self, photos: Sequence[PhotoSource], messages: list[Message], settings: Generate | None = None
    ) -> ReplyStream:
        """As `Answerer.stream_messages`."""
        return ReplyStream(self._pieces(self._messages(photos, messages), settings))

    def answer_many(
        self, requests: Iterable[Request], settings: Generate | None = None, most_tokens: int | None = None
    ) -> Iterator[Reply | UserError]:
        """As `Answerer.answer_many`, with several requests under way at once; `most_tokens` means nothing here.

        A server that fails at one of several is asked again alone, and one by one from then on.

        Raises:
            ServerGoneError: the other requests would fail too.
        """
        rest, under_way, at_once = iter(requests), deque[tuple[Request, Future[Reply], bool]](), AT_ONCE
        while True:
            for request in itertools.islice(rest, max(at_once - len(under_way), 0)):
                under_way.append((request, self._begun(request, settings), at_once == 1))
            if not under_way:
                return
            request, reply, alone = under_way.popleft()
            try:
                if not alone and isinstance(reply.exception(), ServerGoneError):
                    at_once = 1
                    wait(other for _, other, _ in under_way)
                    reply = self._begun(request, settings)
                yield reply.result()
            except ServerGoneError:
                raise
            except UserError as error:
                yield error

    def _begun(self, request: Request, settings: Generate | None) -> Future[Reply]:
        """Ask in a thread of its own, which keeps no program from ending."""
        reply: Future[Reply] = Future()

        def ask(fields: dict[str, Any]) -> None:
            try:
                reply.set_result(self._whole(fields))
            except Exception as error:
                reply.set_exception(error)

        try:
            fields = self._fields(self._messages(*request), settings)  # here, for the sake of the recent photos
            threading.Thread(target=ask, args=(fields,), daemon=True).start()
        except UserError as error:
            reply.set_exception(error)
        return reply

    def _messages(self, photos: Sequence[PhotoSource], messages: list[Message]) -> Iterator[dict[str, Any]]:
        rest = iter(photos)
        for message in messages:
            parts = [part if isinstance(part, str) else self._photo(next(rest)) for part in message.parts]
            yield _message(message.role, parts)

    def _photo(self, photo: PhotoSource) -> dict[str, Any]:
        # a PIL image has no hash
        url = self._data_url(photo) if on_disk(photo) else data_url(photo)
        return {"type": "image_url", "image_url": {"url": url}}

    def _fields(self, messages: Iterable[dict[str, Any]], settings: Generate | None) -> dict[str, Any]:
        fields = (settings or self.settings).model_dump(exclude_unset=True)
        neutral = Generate()
        # OpenAI's protocol has no field for it, and servers ignore what they do not know
        if fields.pop("num_beams", 1) != 1:
            raise UserError("a server is asked with its own number of beams: leave generate.num_beams out")
        fields.pop("length_penalty", None)  # of beams only
        fields = {
            name: value for name, value in fields.items() if name not in EXTENSIONS or value != getattr(neutral, name)
        }
        if "max_new_tokens" in fields:
            fields["max_tokens"] = fields.pop("max_new_tokens")
        return {"model": self.name, "messages": list(messages)} | fields

    def _whole(self, fields: dict[str, Any]) -> Reply:
        answer = self._server.fetch(_Answer, "POST", "/chat/completions", fields)
        if not answer.choices:
            raise self._server.foreign(answer.model_dump_json())
        choice = answer.choices[0]
        return _reply(choice.message.content or "", choice.finish_reason, answer.usage)

    def _pieces(self, messages: Iterable[dict[str, Any]], settings: Generate | None) -> Generator[str, None, Reply]:
        """Yield the text of an answer piece by piece; return the whole of it."""
        began = time.perf_counter()
        fields = self._fields(messages, settings) | {"stream": True, "stream_options": {"include_usage": True}}
        text, first, pieces, reason, usage = "", 0.0, 0, None, None
        with self._server.opened("POST", "/chat/completions", fields) as response:
            try:
                for event in self._server.events(_Answer, response):
                    usage = event.usage or usage
                    for choice in event.choices[:1]:
                        reason = choice.finish_reason or reason
                        if piece := choice.delta.content:
                            first = first or time.perf_counter() - began
                            text, pieces = text + piece, pieces + 1
                            yield piece
            except CancelledError:
                reason = "cancelled"
        if reason is None:
            raise self._server.broken_off(text)
        took = time.perf_counter() - began - first
        return _reply(text, reason, usage, first, (pieces - 1) / took if pieces > 1 else 0.0)


def _message(role: str, parts: Iterable[str | dict[str, Any]]) -> dict[str, Any]:
    """Return a message of the protocol; the line break between a photo and a text is left out, for it is implied."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, str):
            if content and content[-1]["type"] == "text":
                content[-1]["text"] = content[-1]["text"].removesuffix("\n")
            content.append(part)
        elif text := part.removeprefix("\n") if content else part:
            content.append({"type": "text", "text": text})
    if all(part["type"] == "text" for part in content):
        return {"role": role, "content": "".join(part["text"] for part in content)}
    return {"role": role, "content": content}


def _reply(text: str, reason: str | None, usage: _Usage | None, first: float = 0.0, speed: float = 0.0) -> Reply:
    """Return the answer; tokens are 0 where a server does not count them."""
    usage = usage or _Usage()
    known: dict[str | None, FinishReason] = {"length": "length", "cancelled": "cancelled"}
    reused = (usage.prompt_tokens_details or {}).get("cached_tokens")
    reused = reused if isinstance(reused, int) else 0
    finish_reason = known.get(reason, "stop")
    return Reply(text, finish_reason, usage.prompt_tokens, usage.completion_tokens, reused, first, speed)


def data_url(photo: PhotoSource) -> str:
    """Return a photo as data URL: the bytes of the file if every server reads them as we do, else a PNG.

    Raises:
        UserError: as `load_image`.
    """
    image = load_image(photo)
    if isinstance(photo, str | Path) and member_of(photo) is None:
        with Image.open(photo) as opened:
            kind = MEDIA_TYPES.get(opened.format or "")
            # not every server turns a photo upright, or reads one whose EXIF block is damaged
            if kind is not None and orientation_of(opened) == 1:
                return _encoded(kind, Path(photo).read_bytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return _encoded("png", stream.getvalue())


def _encoded(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def connect(args: argparse.Namespace, overrides: dict[str, Any], *sections: str) -> tuple[RemoteAnswerer, ServerConfig]:
    """Return the answerer of `--server`, and what the command line sets beside it.

    Args:
        args: with the options of `cli.add_model_options`.
        sections: that may be set besides `generate`.

    Raises:
        UserError: as `server_config` and `RemoteAnswerer`.
    """
    config = server_config(overrides, *sections)
    return RemoteAnswerer(args.server, read_key(args), args.model, config.generate), config


def server_config(overrides: dict[str, Any], *others: str) -> ServerConfig:
    """Return what a command line sets beside `--server`: decoding settings, and the sections `others`.

    Raises:
        UserError: it sets anything else, which is the server's matter, or a wrong value.
    """
    known = ("generate", *others)
    wrong = next((key for key in overrides if key.partition(".")[0] not in known), None)
    if wrong is not None:
        names = " and ".join(f"{name}.*" for name in known)
        raise UserError(f"'{shortened(wrong)}' is the server's matter: with --server, only {names} can be set here")
    raw: dict[str, Any] = {}
    put_in(raw, overrides, "command line")
    return validated(ServerConfig, raw, "command line")
