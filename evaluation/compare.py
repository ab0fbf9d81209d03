"""Two models on the same questions: the difference, how sure it is, and the answers that flipped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from evaluation.baselines import TRAINED
from evaluation.intervals import Interval, mcnemar
from evaluation.predictions import FILE, Replies, read_predictions
from evaluation.runner import Answer, Question, make_answer
from evaluation.scores import ACCURACY, judge_values, judged_difference, measure_of, sentence_sources


@dataclass(frozen=True)
class Comparison:
    """This model beside another one.

    Attributes:
        name: the other checkpoint.
        measure: the score that judges, here in all types.
        sentences: the sources whose true answers are sentences.
        difference: score of this model less that of the other.
        p: of `test`.
        by_type: question type → difference.
        gained, lost: pairs (answer here, answer there) that only this model, or only the other one, has right; where
            accuracy does not judge, that have a higher score here or there.
    """

    name: str
    measure: str
    sentences: frozenset[str]
    difference: Interval
    p: float
    by_type: dict[str, Interval]
    gained: list[tuple[Answer, Answer]]
    lost: list[tuple[Answer, Answer]]

    @property
    def test(self) -> str:
        """McNemar's: how probable so many gained and lost are by chance alone; of scores that is the sign test."""
        return "McNemar's test" if self.measure == ACCURACY else "sign test"


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
    sentences = sentence_sources(own)
    measure = measure_of(own, sentences)
    pairs = list(zip(own, others, strict=True))
    by_type = {}
    for type_ in sorted({answer.type for answer in own}):
        of_type = [pair for pair in pairs if pair[0].type == type_]
        by_type[type_] = judged_difference(of_type, measure)
    if measure == ACCURACY:
        better = [here.right and not there.right for here, there in pairs]
        worse = [there.right and not here.right for here, there in pairs]
    else:
        values = list(zip(judge_values(own, measure), judge_values(others, measure), strict=True))
        better, worse = [here > there for here, there in values], [here < there for here, there in values]
    return Comparison(
        name=name,
        measure=measure,
        sentences=sentences,
        difference=judged_difference(pairs, measure),
        p=mcnemar(better, worse),
        by_type=by_type,
        gained=[pair for pair, chosen in zip(pairs, better, strict=True) if chosen],
        lost=[pair for pair, chosen in zip(pairs, worse, strict=True) if chosen],
    )
