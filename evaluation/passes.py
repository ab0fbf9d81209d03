"""The passes of an evaluation: the same questions with the own photo, with less than that, and with a worse one.

What a model scores means little alone. `blind` is what it scores with another photo, `text` without any, `untrained`
with a projector that learned nothing, `majority` what the most frequent answer of each type scores. Passes with
distorted photos (`visual/augment.py`) show how much it needs a good one.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from answering.answer import Answerer
from answering.remote import RemoteAnswerer
from answering.request import AnyAnswerer, PhotoSource
from dataset.records import Entry, Photo
from errors import UserError
from evaluation.baselines import BASELINES, TRAINED
from evaluation.intervals import Interval
from evaluation.losses import answer_losses
from evaluation.metrics import normalise
from evaluation.predictions import Predictions, Replies
from evaluation.runner import (
    Answer,
    Progress,
    Question,
    ask,
    list_questions,
    make_answer,
    photos_digest,
    questions_digest,
)
from evaluation.scores import Result, all_intervals, judged, measure_of, score_pass, sentence_sources, visual_gain
from model.checkpoint_folder import weights_digest
from model.model import MMultiModal
from model.portable import portable_config
from qwen.half import HalfLinear
from visual.augment import STRENGTHS, distort
from visual.photo import load_image

DISTORTION_SEED = 0


@dataclass(frozen=True)
class Pass:
    """One way to ask all questions.

    Attributes:
        choose: photos of an entry → photos shown in their place; () leaves them out of the prompt.
        picture: photo → what is shown.
        prepare: changes the model while the pass runs.
    """

    name: str
    choose: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    picture: Callable[[Photo], PhotoSource] = lambda photo: photo.picture
    prepare: Callable[[Any], AbstractContextManager] = nullcontext


class Common(NamedTuple):
    """The most frequent answer of a question type; `origin` says of which questions: "train" or "scored"."""

    answer: str
    origin: str


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        questions: in the order of all lists of answers.
        answers: pass → answers, without distorted photos; `TRAINED` comes first.
        results: pass → scores.
        gain: of `visual_gain`; None without the pass `blind`, or if no question has a photo.
        majority: question type → its most frequent answer; empty without that baseline.
        hard: kind of distortion → score of the questions with a photo, undistorted and at each strength.
    """

    questions: list[Question]
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    gain: Interval | None = None
    majority: dict[str, Common] = field(default_factory=dict)
    hard: dict[str, list[Interval]] = field(default_factory=dict)

    @cached_property
    def sentences(self) -> frozenset[str]:
        """The sources whose true answers are sentences."""
        return sentence_sources(self.answers[TRAINED])

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """All scores of the model with its own photos; see `scores.all_intervals`."""
        return all_intervals(self.answers[TRAINED])

    @property
    def measure(self) -> str:
        """Name of the score that judges all answers together."""
        return measure_of(self.answers[TRAINED], self.sentences)


def evaluate(
    model: MMultiModal | RemoteAnswerer,
    photos: Mapping[int, Photo],
    entries: Sequence[Entry],
    train: Sequence[Entry],
    predictions: Predictions,
    baselines: Iterable[str] = tuple(BASELINES),
    kinds: Sequence[str] = (),
    progress: Callable[[str], Progress] = lambda name: iter,
) -> Evaluation:
    """Ask every turn of every entry in all passes, and score the answers.

    Args:
        model: a server that is asked in place of a model has no losses, and no baseline `NEEDS_WEIGHTS`.
        photos: by ID.
        entries: what is asked, at least one.
        train: entries for the majority answers.
        predictions: answers that are already there; new ones are added to it.
        baselines: names of `BASELINES`.
        kinds: of distorted photos.
        progress: name of a pass → what wraps its list of photo groups.

    Raises:
        UserError: an unreadable photo, or a blind pass without a second photo.
    """
    found = Evaluation(list_questions(entries))
    own: list[Answer] = []
    for one in [Pass(TRAINED), *_baseline_passes(baselines, {entry.images for entry in entries})]:
        answers = _run(one, model, found.questions, photos, predictions, own, progress(one.name))
        own = own or answers
        found.answers[one.name] = answers
    if "majority" in baselines:
        found.majority = majority_answers(found.questions, train)
        found.answers["majority"] = [
            make_answer(question, (), found.majority[question.type].answer) for question in found.questions
        ]
    losses = {}
    if not isinstance(model, RemoteAnswerer):
        losses = answer_losses(model, found.questions, photos, progress("loss"))
    shown = {(question.number, question.turn): question.images[0] for question in found.questions if question.images}
    found.results = {
        name: score_pass(answers, losses if name == TRAINED else None, found.sentences, shown)
        for name, answers in found.answers.items()
    }
    if "blind" in found.answers:
        found.gain = visual_gain(own, found.answers["blind"], found.measure)
    with_photo = [question for question in found.questions if question.images]
    if kinds and with_photo:
        clear = judged([answer for answer in own if answer.images], found.measure)
        for kind in kinds:
            passes = (Pass(f"{kind} {strength}", picture=_distorted(kind, strength)) for strength in STRENGTHS)
            distorted = (_run(one, model, with_photo, photos, predictions, own, progress(one.name)) for one in passes)
            found.hard[kind] = [clear, *(judged(answers, found.measure) for answers in distorted)]
    return found


def answer_questions(
    model: MMultiModal | RemoteAnswerer,
    photos: Mapping[int, Photo],
    entries: Sequence[Entry],
    predictions: Predictions,
    progress: Progress,
) -> list[Answer]:
    """Ask every turn of every entry with its own photo, and score nothing; arguments and errors as `evaluate`."""
    return _run(Pass(TRAINED), model, list_questions(entries), photos, predictions, [], progress)


def _baseline_passes(names: Iterable[str], groups: set[tuple[int, ...]]) -> list[Pass]:
    """Passes of the baselines that ask the model; `groups` are the photos of all entries."""
    passes = [Pass("text", choose=lambda own: ()), Pass("untrained", prepare=untrained_projector)]
    if "blind" in names:  # all at once, so that a missing second photo is said before the first question
        IDs = sorted({ID for group in groups for ID in group})
        others = {group: other_photos(group, IDs) for group in groups}
        passes = [Pass("blind", choose=others.__getitem__), *passes]
    return [one for one in passes if one.name in names]


def _distorted(kind: str, strength: int) -> Callable[[Photo], PhotoSource]:
    # the key, and not the ID: the same photo is distorted in the same way in every data set
    return lambda photo: distort(load_image(photo.picture), kind, strength, f"{DISTORTION_SEED} {photo.key}")


def _run(
    one: Pass,
    model: MMultiModal | RemoteAnswerer,
    questions: list[Question],
    photos: Mapping[int, Photo],
    predictions: Predictions,
    own: list[Answer],
    progress: Progress,
) -> list[Answer]:
    """Ask what `predictions` lacks; return the answers to all questions.

    Args:
        own: answers of the pass `TRAINED`; () if this is it. A prompt without a photo is the same in all passes.
    """
    kept: Replies = predictions.replies.get(one.name, {})
    same = {(answer.entry, answer.turn): answer for answer in own if not answer.images}
    found: dict[tuple[int, int], Answer] = {}
    missing = []
    for question in questions:
        key = (question.number, question.turn)
        if key in kept:
            images = one.choose(question.entry.images)[: question.shown]
            found[key] = make_answer(question, images, *kept[key])
        elif key in same:
            found[key] = same[key]
            predictions.add(one.name, same[key], [])
        else:
            missing.append(question)
    with one.prepare(model):
        # its own engine, because a cache of another pass has tokens of another projector
        answerer: AnyAnswerer = model if isinstance(model, RemoteAnswerer) else Answerer(model)
        replies = ask(answerer, missing, one.choose, lambda ID: one.picture(photos[ID]), progress)
        for question, images, reply in replies if missing else ():
            answer = make_answer(question, images, reply.text, reply.finish_reason)
            found[question.number, question.turn] = answer
            predictions.add(one.name, answer, [photos[ID].key for ID in images])
    return [found[question.number, question.turn] for question in questions]


def other_photos(own: tuple[int, ...], IDs: list[int]) -> tuple[int, ...]:
    """Choose a deterministic replacement for each photo: half the sorted list further, and not in `own`."""
    others = []
    for ID in own:
        middle = bisect.bisect_left(IDs, ID) + len(IDs) // 2
        candidates = (IDs[(middle + step) % len(IDs)] for step in range(len(IDs)))
        other = next((candidate for candidate in candidates if candidate not in own), None)
        if other is None:
            raise UserError(
                f"the baseline 'blind' swaps photos, but the split has no other than {list(own)}: name the other "
                "baselines (--baselines text untrained majority)"
            )
        others.append(other)
    return tuple(others)


@contextmanager
def untrained_projector(model: MMultiModal) -> Iterator[None]:
    """Give the model a projector with fresh weights, always the same ones; the trained one comes back at the end."""
    trained = model.feature_proj
    model.feature_proj = model.fresh_projector()
    try:
        yield
    finally:
        model.feature_proj = trained


def majority_answers(questions: list[Question], train: Sequence[Entry]) -> dict[str, Common]:
    """Most frequent reference of each question type, compared as the metrics do and spelt as it first occurs.

    Args:
        train: the training part. A type that it lacks takes the answers of `questions` themselves.
    """
    trained = _most_frequent(list_questions(train))
    scored = _most_frequent(questions)
    return {
        type_: Common(trained[type_], "train") if type_ in trained else Common(scored[type_], "scored")
        for type_ in scored
    }


def _most_frequent(questions: list[Question]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    spelling: dict[str, str] = {}
    for question in questions:
        for text in question.references:
            form = normalise(text)
            spelling.setdefault(form, text)
            counts.setdefault(question.type, Counter())[form] += 1
    return {type_: spelling[counter.most_common(1)[0][0]] for type_, counter in counts.items()}


def describe(
    model: MMultiModal | RemoteAnswerer,
    checkpoint: Path,
    entries: Sequence[Entry],
    photos: Mapping[int, Photo],
    split: str,
    limit: int | None,
) -> dict[str, Any]:
    """What the answers depend on: weights or server, decoding settings, questions and photos, in values for JSON.

    Args:
        checkpoint: of the model; not looked at for a server.
    """
    questions = list_questions(entries)
    asked = {
        "split": split,
        "limit": limit,
        "questions": questions_digest(questions, photos),
        "photos": photos_digest(questions, photos),
    }
    if isinstance(model, RemoteAnswerer):
        settings = model.settings.model_dump(mode="json", exclude_unset=True)
        return {"checkpoint": model.name, **asked, "generate": settings, "computed": f"by {model.url}"}
    sections = portable_config(model.config)
    parameter = next(model.feature_proj.parameters())
    half = ", fp16 weights" if any(isinstance(layer, HalfLinear) for layer in model.LLM.modules()) else ""
    return {
        "checkpoint": checkpoint.name,
        "weights": weights_digest(checkpoint),
        **asked,
        **{name: sections[name] for name in ("prompt", "visual", "llm", "projector", "generate")},
        "computed": f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}{half}",
    }
