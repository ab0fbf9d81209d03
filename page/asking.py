"""Answering a question of the page: waiting in the line, the answer as it grows, figures, and errors as sentences."""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image

from answering.answer import Answerer
from answering.remote import RemoteAnswerer
from answering.request import AnyAnswerer, Reply, ReplyStream
from config import Generate, changed
from errors import UserError, check_text, is_defect, is_out_of_memory
from page.chat import History, UploadedPhoto, checked, in_box, photos_of, with_names, with_part
from page.checkpoints import Engines
from page.line import Place, WaitingLine
from page.texts import say
from page.uploads import BATCH, NotUploadedError, SessionFiles
from visual.region import parse_box
from visual.transform import load_image

REFRESH_SECONDS = 0.05  # the page is redrawn at most this often while an answer grows
WAIT_SECONDS = 0.5  # the place in the line is shown anew this often

# of events that only the page sends. preprocess=False: Gradio would raise a traceback for a file that is not an upload.
# No limit: else Gradio would let four wait in the page's line, and tell the others nothing.
PRIVATE: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": None,
}

decoded = functools.lru_cache(maxsize=8)(load_image)  # each upload has its own path; follow-ups decode nothing


class Work:
    """The answer that a session waits for; another thread may stop it.

    Attributes:
        left: whether the session has ended.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.left = False
        self._stream: ReplyStream | None = None

    def begin(self, stream: ReplyStream) -> None:
        self._stream = stream
        if self.stopped:
            stream.close()

    def stop(self) -> None:
        self.stopped = True
        if self._stream is not None:
            self._stream.close()


@dataclass(frozen=True)
class Shared:
    """What all sessions of a page share.

    Attributes:
        generate: settings that the page starts with.
        running: the answer that each session waits for, by session.
    """

    engines: Engines
    generate: Generate
    files: SessionFiles
    line: WaitingLine = field(default_factory=WaitingLine)
    running: dict[str, Work] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.files.folder

    @contextlib.contextmanager
    def work(self, session: str) -> Iterator[Work | None]:
        """Begin the work of a session; None: it waits for an answer already."""
        work = Work()
        if self.running.setdefault(session, work) is not work:
            yield None
            return
        try:
            yield work
        finally:
            work.stop()
            del self.running[session]
            if work.left:  # it may have held files since
                self._release(session)

    def stop(self, session: str) -> None:
        """Stop the answer that a session waits for, if any."""
        if work := self.running.get(session):
            work.stop()

    def end(self, session: str) -> None:
        """Stop a session's answer and let go of its files."""
        if work := self.running.get(session):
            work.left = True
            work.stop()
        self._release(session)

    def _release(self, session: str) -> None:
        self.files.release(session)
        self.files.release(session + BATCH)


class Caller(NamedTuple):
    """Who asks, and how.

    Attributes:
        settings: fields of `Generate`, and `system`, which may be empty.
        box: text of a box in the last photo, or an empty one.
    """

    session: str
    language: str
    checkpoint: str
    settings: dict[str, Any]
    box: str = ""


class Step(NamedTuple):
    """What the page shows while a question is answered.

    Attributes:
        history: the dialogue, as the next question goes on with it.
        line: for the status line.
        busy: whether more follows.
        failed: shown after the dialogue, but not part of it.
        question: new content of the question box; None: it stays as it is.
    """

    history: History
    line: str
    busy: bool = True
    failed: Sequence[dict[str, Any]] = ()
    question: dict[str, Any] | None = None


def answer(shared: Shared, caller: Caller, work: Work, history: History, uploads: list[Any]) -> Iterator[Step]:
    """Answer the last question of `history`, sent with `uploads`; any error becomes a sentence in the chat."""
    *before, question = history
    readable: list[UploadedPhoto] = []
    try:
        # check before display, because the page serves every displayed file
        photos = [checked(upload, shared.folder) for upload in uploads]
        shared.files.hold(caller.session, *(photo.path for photo in photos))
        readable, question = photos, question | {"photos": photos}
        yield Step([*before, question], say(caller.language, "working"))
        check_text(question["content"], "the question")
        settings = decoding(shared.generate, caller.settings)
        readable, problems = _readable(photos)
        if problems:
            raise problems[0]
        if caller.box:
            image = decoded(photos_of([*before, question])[-1].path)
            question = with_part(question, parse_box(caller.box), image, shared.folder)
            shared.files.hold(caller.session, question["part"])
        yield from _answered(shared, caller, work, [*before, question], settings)
    except Exception as error:
        sentence = sentence_of(error, photos_of(history) + photos_of([question]), caller.language)
        failed = [question | {"photos": readable}, {"role": "assistant", "content": sentence}]
        yield Step(before, "", busy=False, failed=failed, question=in_box(question["content"], readable))
        if is_defect(error):
            raise


def _answered(shared: Shared, caller: Caller, work: Work, history: History, settings: Generate) -> Iterator[Step]:
    """Wait for the turn, then answer."""
    language, text, figures = caller.language, "", ""
    with shared.line.place() as place:
        for sentence in until_turn(shared, place, work, language, caller.checkpoint):
            yield Step(history, sentence)
        reply = Reply("", "cancelled", 0, 0)  # before its turn
        if not work.stopped:
            (engine,) = shared.engines.get(caller.checkpoint)
            stream = engine.stream(None, sent(history, engine, shared.folder, caller.settings["system"]), settings)
            for text in growing(stream, work):
                yield Step([*history, {"role": "assistant", "content": text}], say(language, "working"))
            assert stream.reply is not None, "the stream has ended"
            reply = stream.reply
            figures = line_of_figures(reply, engine, language)
            del engine, stream  # the next in the line may load another model while this waits to be shown
    stopped = reply.finish_reason == "cancelled"
    if text or not stopped:
        line = f"{say(language, 'stopped')} {figures}" if stopped else figures
        yield Step([*history, {"role": "assistant", "content": text}], line, busy=False)
    else:  # before the first word: return the question to the box
        question = in_box(history[-1]["content"], history[-1]["photos"])
        yield Step(history[:-1], say(language, "stopped"), busy=False, question=question)


def until_turn(shared: Shared, place: Place, work: Work, language: str, *names: str) -> Iterator[str]:
    """Yield sentences until it is the turn of `place`, then those about checkpoints to load; none after a stop."""
    while (ahead := place.ahead(WAIT_SECONDS)) and not work.stopped:
        yield say(language, "waiting", ahead=ahead)
    for name in names:
        if not work.stopped and shared.engines.loaded(name) is None:
            yield say(language, "loading", name=name)


def decoding(generate: Generate, settings: dict[str, Any]) -> Generate:
    """Return decoding settings; those that are as before stay unset, which matters to a server.

    Only the temperature is always set, because the page says whether the words are the likeliest.

    Raises:
        UserError: a wrong value.
    """
    known = {name: value for name, value in settings.items() if name in Generate.model_fields}
    given = {k: v for k, v in known.items() if k == "temperature" or v != getattr(generate, k)}
    return changed(generate, given, "settings")


def system_text(system: Any) -> str:
    """Return the text of the settings' system message; empty: that of the training.

    Raises:
        UserError: half a surrogate pair.
    """
    text = system.strip() if isinstance(system, str) else ""
    check_text(text, "the system message")
    return text


def sent(history: History, engine: AnyAnswerer, folder: Path, system: Any) -> list[dict[str, Any]]:
    """Return a dialogue as `Answerer.stream` takes it.

    Raises:
        UserError: a photo is gone or broken, or the system message is no text.
    """

    def load(photo: UploadedPhoto) -> Image.Image | Path:
        path = checked({"path": photo.path}, folder).path  # checks that it still exists, keeps it another hour
        image = decoded(path)
        return Path(path) if isinstance(engine, RemoteAnswerer) else image  # a file is smaller on its way

    messages: list[dict[str, Any]] = []
    if text := system_text(system):
        messages.append({"role": "system", "content": text})
    for message in history:
        images = [load(photo) for photo in message.get("photos", ())]
        messages.append({"role": message["role"], "content": message["content"], "images": images})
        if "box" in message:
            messages[-1]["box"] = message["box"]
    return messages


def growing(stream: ReplyStream, work: Work) -> Iterator[str]:
    """Yield the text so far, at most every `REFRESH_SECONDS` and once at the end, without what comes after a stop."""
    work.begin(stream)
    shown, text = time.perf_counter(), ""
    with contextlib.closing(stream):
        for piece in stream:
            if work.stopped:  # the stream gives the token that was on its way
                break
            text += piece
            if time.perf_counter() - shown >= REFRESH_SECONDS:
                yield text
                shown = time.perf_counter()
    yield text


def line_of_figures(reply: Reply, engine: AnyAnswerer, language: str) -> str:
    """Return the figures of an answer, and the memory that is in use."""
    figures = say(
        language,
        "figures",
        first=reply.seconds_to_first_token,
        speed=reply.tokens_per_second,
        new=reply.tokens_in - reply.tokens_reused,
        reused=reply.tokens_reused,
        out=reply.tokens_out,
    )
    parts = [figures]
    if isinstance(engine, Answerer):
        on_gpu = engine.model.device.type == "cuda"
        used = torch.cuda.memory_allocated(engine.model.device) if on_gpu else psutil.Process().memory_info().rss
        parts.append(say(language, "memory", gib=used / 2**30))
    if reply.finish_reason == "length":
        parts.append(say(language, "cut_off"))
    return " · ".join(parts)


def sentence_of(error: Exception, photos: list[UploadedPhoto], language: str) -> str:
    """Return the message for the user, with file names instead of paths on the server."""
    if is_out_of_memory(error):
        sentence = say(language, "out_of_memory")
    elif isinstance(error, NotUploadedError):
        sentence = say(language, "gone")
    else:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        sentence = say(language, "error", sentence=with_names(text, photos))
    return f"⚠ {sentence}"


def _readable(photos: list[UploadedPhoto]) -> tuple[list[UploadedPhoto], list[UserError]]:
    """Return the readable photos, and the errors of the others."""
    sound, problems = [], []
    for photo in photos:
        try:
            decoded(photo.path)
            sound.append(photo)
        except UserError as error:
            problems.append(error)
    return sound, problems
