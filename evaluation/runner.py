"""Evaluation of a model on the questions of a data set; called by `eval_vqa.py`.

The prompt is the one of training (`entry_messages`). The questions are answered in batches. All questions of one photo
follow one another, because a batch computes the keys and values of its photos once.
"""

import bisect
import random
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from answering.answer import Answerer
from answering.request import Reply, Request
from config import IMAGE_TAG
from dataset.image_caption_dataset import entry_messages
from dataset.records import Entry, Photo
from errors import UserError
from evaluation import captions, metrics
from evaluation.intervals import Interval, Tally, difference, interval, mean_tally
from evaluation.words import cuts
from qwen.chat import ChatFormat


@dataclass(frozen=True)
class Answer:
    """One question of the data set with the model's answer.

    Attributes:
        images: IDs of the photos in the prompt, photos of earlier turns first.
    """

    images: tuple[int, ...]
    type: str
    question: str
    references: tuple[str, ...]
    answer: str
    accuracy: float


@dataclass(frozen=True)
class Score:
    """Scores of `questions` questions: accuracy, token F1 and ANLS in 0..1, BLEU-4 and chrF in 0..100.

    Attributes:
        accuracy_interval: ends of its 95 % interval, by resampled photos.
        captions: how texts are cut into words → scores of `captions.caption_scores`.
    """

    questions: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    token_f1: float
    bleu4: float
    chrf: float
    anls: float
    captions: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Result:
    """Result of one pass over the questions; the JSON report contains its fields."""

    blind: bool
    photos: int
    seconds: float
    overall: Score
    by_type: dict[str, Score]
    answers: list[Answer]


def evaluate(
    answerer: Answerer,
    entries: list[Entry],
    photos: dict[int, Photo],
    *,
    blind: bool = False,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Result:
    """Ask every turn of every entry, with the true earlier turns as context, and score the answers.

    Args:
        entries: entries of `dataset.records.read_records`, usually of one split.
        photos: photo ID → photo.
        blind: replace the photos of each question by other photos, to measure guessing without the photo. Text-only
            questions do not change.
        progress: wraps the list of photo groups, for example `tqdm`.

    Raises:
        UserError: no entries, an unreadable photo, or a blind pass without a second photo.
    """
    if not entries:
        raise UserError("nothing to evaluate: the split has no questions. Raise data.val_fraction or pass --split all")
    all_IDs = sorted({ID for entry in entries for ID in entry.images})
    groups: dict[tuple[int, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.images, []).append(entry)

    answers = []
    start = time.perf_counter()
    shown = [(_other_photos(own, all_IDs) if blind else own, group) for own, group in groups.items()]
    chat = answerer.model.processor.chat
    replies = answerer.answer_many(
        turn_request(entry, number, [photos[ID] for ID in IDs], chat)
        for IDs, group in shown
        for entry in group
        for number in range(len(entry.turns))
    )
    for IDs, group in progress(shown):
        for entry in group:
            answers += [_scored(entry, number, IDs, next(replies)) for number in range(len(entry.turns))]
    return Result(
        blind=blind,
        photos=len(all_IDs),
        seconds=time.perf_counter() - start,
        overall=score(answers),
        by_type={
            type_: score([answer for answer in answers if answer.type == type_])
            for type_ in sorted({answer.type for answer in answers})
        },
        answers=answers,
    )


def sample_photos(entries: list[Entry], limit: int, seed: int) -> list[Entry]:
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


def score(answers: list[Answer]) -> Score:
    """Compute the scores of a non-empty list of answers."""
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    accuracy, low, high = interval(_accuracies(answers), _photos_of(answers))
    return Score(
        questions=len(answers),
        accuracy=accuracy,
        accuracy_interval=(low, high),
        token_f1=sum(map(metrics.token_f1, texts, references)) / len(answers),
        bleu4=captions.corpus_bleu(texts, references),
        chrf=captions.corpus_chrf(texts, references),
        anls=sum(map(metrics.anls, texts, references)) / len(answers),
        captions={
            name: captions.caption_scores(texts, references, cut)
            for name, cut in cuts(text for own in references for text in own).items()
        },
    )


def visual_gain(trained: Result, blind: Result) -> Interval | None:
    """Accuracy with the photo less accuracy with another one, and its 95 % interval; None: no question has a photo.

    Args:
        trained, blind: both passes over the same questions. Text-only questions do not count.
    """
    pairs = [pair for pair in zip(trained.answers, blind.answers, strict=True) if pair[0].images]
    if not pairs:
        return None
    own, other = map(list, zip(*pairs, strict=True))
    return difference(_accuracies(own), _accuracies(other), _photos_of(own))


def _accuracies(answers: list[Answer]) -> Tally:
    return mean_tally([answer.accuracy for answer in answers])


def _photos_of(answers: list[Answer]) -> list[Hashable]:
    """Key of each answer's (first) photo; a text-only question has a key of its own."""
    return [answer.images[0] if answer.images else (number,) for number, answer in enumerate(answers)]


def turn_request(entry: Entry, number: int, photos: list[Photo], chat: ChatFormat) -> Request:
    """Turn `number` of an entry as a request, with the true earlier answers; `photos` are those of all turns."""
    earlier = [turn.answers[0] for turn in entry.turns[:number]]
    paths = [photo.path for photo in photos[: _photos_shown(entry, number)]]
    return Request(paths, entry_messages(entry, chat, earlier))


def _photos_shown(entry: Entry, number: int) -> int:
    """Photos in the prompt of turn `number`: not those of later turns."""
    return sum(len(turn.images) for turn in entry.turns[: number + 1])


def _scored(entry: Entry, number: int, IDs: tuple[int, ...], reply: Reply | UserError) -> Answer:
    """Score the answer to turn `number`; `IDs` are the photos of all turns.

    Raises:
        UserError: there is no answer, for this reason.
    """
    if isinstance(reply, UserError):
        raise reply
    turn = entry.turns[number]
    return Answer(
        images=IDs[: _photos_shown(entry, number)],
        type=turn.type or entry.type,
        question=turn.question.replace(IMAGE_TAG, "", len(turn.images)).strip(),
        references=turn.answers,
        answer=reply.text,
        accuracy=metrics.accuracy(reply.text, turn.answers),
    )


def _other_photos(own: tuple[int, ...], IDs: list[int]) -> tuple[int, ...]:
    """Choose a deterministic replacement for each photo: half the sorted list further, and not in `own`."""
    others = []
    for ID in own:
        middle = bisect.bisect_left(IDs, ID) + len(IDs) // 2
        candidates = (IDs[(middle + step) % len(IDs)] for step in range(len(IDs)))
        other = next((candidate for candidate in candidates if candidate not in own), None)
        if other is None:
            raise UserError(f"a blind pass swaps photos, but the split has no other than {list(own)}: pass --no-blind")
        others.append(other)
    return tuple(others)
