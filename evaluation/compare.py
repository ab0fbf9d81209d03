"""Two models on the same questions: the difference, how sure it is, and the answers that flipped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from evaluation.baselines import TRAINED
from evaluation.intervals import Interval, mcnemar
from evaluation.predictions import FILE, Replies, read_predictions
from evaluation.runner import Answer, Question, make_answer
from evaluation.scores import are_sentences, judge_values, judged_difference


@dataclass(frozen=True)
class Comparison:
    """This model beside another one.

    Attributes:
        name: the other checkpoint.
        sentences: whether CIDEr-D judges, and not accuracy.
        difference: score of this model less that of the other.
        p: of McNemar's test; of sentences, how probable it is that so many are better here or there by chance alone.
        by_type: question type → difference.
        gained, lost: pairs (answer here, answer there) that only this model, or only the other one, has right; of
            sentences, that have a higher CIDEr-D here or there.
    """

    name: str
    sentences: bool
    difference: Interval
    p: float
    by_type: dict[str, Interval]
    gained: list[tuple[Answer, Answer]]
    lost: list[tuple[Answer, Answer]]


def find_other(folder: Path, split: str) -> tuple[dict[str, Any], Replies]:
    """Read the settings and the answers of an earlier evaluation.

    Args:
        folder: what `eval_vqa.py --output` named, or a checkpoint folder that has one for this split.

    Raises:
        UserError: there is none, or it is unfinished or damaged.
    """
    places = [folder / FILE, folder / f"eval_{split}" / FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"--compare: {folder} has neither {FILE} nor eval_{split}/{FILE}: score the other checkpoint first, with "
            "the same --split and --limit"
        )
    settings, replies = read_predictions(file)
    return settings, replies.get(TRAINED, {})


def check_same_questions(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """Compare the settings of two evaluations; raise UserError unless both asked the same questions.

    Returns:
        A sentence for the user if they differ in what can change answers by rounding, else "".
    """
    if other.get("questions") == mine["questions"]:
        there, here = other.get("computed"), mine.get("computed")
        return "" if there == here else f"--compare: computed in {there} there, in {here} here"
    names = [name for name in ("split", "limit") if other.get(name) != mine[name]]
    found = ", ".join(f"--{name} {other.get(name)} there and {mine[name]} here" for name in names)
    raise UserError(
        f"--compare: {other.get('checkpoint')} was asked other questions ({found or 'the data differ'}): score it "
        "again on these data, with the same --split and --limit"
    )


def compare(name: str, questions: list[Question], own: list[Answer], replies: Replies) -> Comparison:
    """Compare answers to the same questions.

    Args:
        own: answers to `questions`, in their order.
        replies: what the other model answered; it is scored here.

    Raises:
        UserError: an answer is missing.
    """
    missing = sum((question.number, question.turn) not in replies for question in questions)
    if missing:
        raise UserError(
            f"--compare: the evaluation of {name} lacks {missing} of {len(questions)} answers: run it again, it goes "
            "on where it stopped"
        )
    others = [
        make_answer(question, question.images, *replies[question.number, question.turn]) for question in questions
    ]
    sentences = are_sentences(text for question in questions for text in question.references)
    pairs = list(zip(own, others, strict=True))
    by_type = {}
    for type_ in sorted({answer.type for answer in own}):
        of_type = [pair for pair in pairs if pair[0].type == type_]
        by_type[type_] = judged_difference(of_type, sentences)
    if sentences:
        values = list(zip(judge_values(own, sentences), judge_values(others, sentences), strict=True))
        better, worse = [here > there for here, there in values], [here < there for here, there in values]
    else:
        better = [here.right and not there.right for here, there in pairs]
        worse = [there.right and not here.right for here, there in pairs]
    return Comparison(
        name=name,
        sentences=sentences,
        difference=judged_difference(pairs, sentences),
        p=mcnemar(better, worse),
        by_type=by_type,
        gained=[pair for pair, chosen in zip(pairs, better, strict=True) if chosen],
        lost=[pair for pair, chosen in zip(pairs, worse, strict=True) if chosen],
    )
