"""Asking a model the questions of a data set; `passes.py` says with which photos, `scores.py` scores the answers.

The prompt is the one of training (`entry_messages`). The questions are answered in batches. All questions of one photo
follow one another, because a batch computes the keys and values of its photos once.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from answering.request import AnyAnswerer, PhotoSource, Reply, Request
from config import IMAGE_TAG
from dataset.image_caption_dataset import entry_messages
from dataset.records import Entry, Photo
from errors import UserError
from evaluation import metrics
from qwen.chat import MessageFormat
from visual.shard import member_of

Progress = Callable[[list[Any]], Iterable[Any]]  # wraps a list, for example `tqdm`


class Question(NamedTuple):
    """A turn of an entry; it is asked with the true earlier turns before it.

    Attributes:
        number: place of the entry in the list of asked entries.
    """

    number: int
    turn: int
    entry: Entry

    @property
    def images(self) -> tuple[int, ...]:
        """IDs of the photos in the prompt, in reading order: not those of later turns."""
        return self.entry.images[: self.shown]

    @property
    def shown(self) -> int:
        """Number of photos in the prompt."""
        return sum(len(turn.images) for turn in self.entry.turns[: self.turn + 1])

    @property
    def type(self) -> str:
        return self.entry.turns[self.turn].type or self.entry.type

    @property
    def text(self) -> str:
        turn = self.entry.turns[self.turn]
        return turn.question.replace(IMAGE_TAG, "", len(turn.images)).strip()

    @property
    def references(self) -> tuple[str, ...]:
        return self.entry.turns[self.turn].answers


@dataclass(frozen=True)
class Answer:
    """The answer to one question in one pass.

    Attributes:
        entry, turn: `number` and `turn` of its question.
        images: IDs of the photos in the prompt, photos of earlier turns first.
        accuracy: nan without references.
        finish_reason: of `Reply`; "" if no model answered.
    """

    entry: int
    turn: int
    images: tuple[int, ...]
    type: str
    source: str
    question: str
    references: tuple[str, ...]
    answer: str
    accuracy: float
    finish_reason: str = ""

    @property
    def right(self) -> bool:
        """Whether at least half of the accuracy is reached: two of ten annotators agree, or one reference does."""
        return self.accuracy >= 0.5


def make_answer(question: Question, images: tuple[int, ...], text: str, finish_reason: str = "") -> Answer:
    """Score the answer `text`; `images` are the photos that the prompt had."""
    return Answer(
        entry=question.number,
        turn=question.turn,
        images=images,
        type=question.type,
        source=question.entry.source,
        question=question.text,
        references=question.references,
        answer=text,
        accuracy=metrics.accuracy(text, question.references) if question.references else math.nan,
        finish_reason=finish_reason,
    )


def list_questions(entries: Sequence[Entry]) -> list[Question]:
    """Every turn of every entry; those on the same photos follow one another."""
    groups: dict[tuple[int, ...], list[Question]] = {}
    for number, entry in enumerate(entries):
        questions = (Question(number, turn, entry) for turn in range(len(entry.turns)))
        groups.setdefault(entry.images, []).extend(questions)
    return [question for group in groups.values() for question in group]


def questions_digest(questions: list[Question], photos: Mapping[int, Photo]) -> str:
    """Hash of what is asked: photo keys, questions and references, with the place of each in its entry."""
    digest = hashlib.sha256()
    for question in questions:
        keys = [photos[ID].key for ID in question.images]
        asked = question.entry.turns[question.turn].question
        digest.update(orjson.dumps([question.number, question.turn, keys, question.type, asked, question.references]))
    return digest.hexdigest()[:16]


def photos_digest(questions: list[Question], photos: Mapping[int, Photo]) -> str:
    """Hash of the photos' sizes in bytes. Photos of the same names in another folder, or edited ones, have others."""
    sizes = {}
    for ID in {ID for question in questions for ID in question.images}:
        member = member_of(path := photos[ID].path)
        in_file = path.stat().st_size if path.is_file() else 0
        sizes[photos[ID].key] = in_file if member is None else member.size
    return hashlib.sha256(orjson.dumps(sizes, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def ask(
    answerer: AnyAnswerer,
    questions: list[Question],
    choose: Callable[[tuple[int, ...]], tuple[int, ...]],
    picture: Callable[[int], PhotoSource],
    progress: Progress = iter,
) -> Iterator[tuple[Question, tuple[int, ...], Reply]]:
    """Ask the questions; yield each with the IDs of the photos in its prompt and the reply.

    Args:
        questions: of `list_questions`, or a part of them in that order.
        choose: photos of an entry → photos shown in their place, as many; () to leave them out of the prompt.
        picture: photo ID → what is shown; called once for all questions on the same photos.
        progress: wraps the list of photo groups.

    Raises:
        UserError: an unreadable photo, or a dialogue longer than the language model's context.
    """
    groups: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question.entry.images, []).append(question)
    shown = [(choose(own), group) for own, group in groups.items()]
    chat = answerer.chat

    def requests() -> Iterator[Request]:
        for IDs, group in shown:
            pictures = [picture(ID) for ID in IDs]
            for question in group:
                entry = question.entry if len(IDs) == len(question.entry.images) else without_photos(question.entry)
                yield turn_request(entry, question.turn, pictures, chat)

    replies = answerer.answer_many(requests())
    for IDs, group in progress(shown):
        for question in group:
            reply = next(replies)
            if isinstance(reply, UserError):
                raise reply
            yield question, IDs[: question.shown], reply


def turn_request(entry: Entry, number: int, pictures: Sequence[PhotoSource], chat: MessageFormat) -> Request:
    """Turn `number` of an entry as a request, with the true earlier answers; `pictures` are those of all turns."""
    earlier = [turn.answers[0] for turn in entry.turns[:number]]
    return Request(pictures[: Question(0, number, entry).shown], entry_messages(entry, chat, earlier))


def without_photos(entry: Entry) -> Entry:
    """The entry as one of text only: its photos and their tags are left out."""

    def text(question: str, photos: int) -> str:
        first, *rest = question.split(IMAGE_TAG, photos)
        return (first + "".join(piece.removeprefix("\n") for piece in rest)).strip()

    turns = (replace(turn, question=text(turn.question, len(turn.images)), images=()) for turn in entry.turns)
    return replace(entry, turns=tuple(turns))


def sample_photos(entries: Sequence[Entry], limit: int, seed: int) -> list[Entry]:
    """Draw the entries on about `limit` photos of all sources, and the same share of entries without a photo.

    The order stays. Photos of one entry are drawn together, so the result may have a few more photos. If no entry has a
    photo, `limit` entries are drawn.
    """
    draw = random.Random(seed)
    texts = [number for number, entry in enumerate(entries) if not entry.images]
    groups = sorted({entry.images for entry in entries if entry.images})
    total = len({ID for group in groups for ID in group})
    draw.shuffle(groups)
    drawn: set[int] = set()
    for group in groups:
        if len(drawn) >= limit:
            break
        drawn.update(group)
    count = round(len(texts) * len(drawn) / total) if total else limit
    kept = set(draw.sample(texts, min(count, len(texts))))
    return [
        entry
        for number, entry in enumerate(entries)
        if (set(entry.images) <= drawn if entry.images else number in kept)
    ]
