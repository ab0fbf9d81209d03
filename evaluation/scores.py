"""Scores of the answers of one pass: in all, by question type and by source."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from evaluation import captions, metrics
from evaluation.intervals import Interval, Tally, difference, interval, mean_tally
from evaluation.losses import Loss
from evaluation.runner import Answer
from evaluation.words import cuts
from evaluation.wups import find_nouns, wups


@dataclass(frozen=True)
class Score:
    """Scores of `questions` questions: accuracy, token F1 and ANLS in 0..1, BLEU-4 and chrF in 0..100.

    Attributes:
        accuracy_interval: ends of its 95 % interval, by resampled photos.
        captions: how texts are cut into words → scores of `captions.caption_scores`.
        daquar: accuracy and WUPS@0.9 of lists of things, in 0..1; None unless all questions are of DAQUAR. WUPS is
            None without WordNet's files.
        loss: of the references, in nats per token; None where it was not computed.
        perplexity: its exponential.
    """

    questions: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    token_f1: float
    bleu4: float
    chrf: float
    anls: float
    captions: dict[str, dict[str, float]]
    daquar: dict[str, float | None] | None
    loss: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Result:
    """Scores of one pass."""

    overall: Score
    by_type: dict[str, Score]
    by_source: dict[str, Score]


Losses = Mapping[tuple[str, str], Loss]  # by question type and source


def score_pass(answers: list[Answer], losses: Losses | None = None) -> Result:
    """Score a non-empty list of answers; `losses` are those of the same questions."""

    def by(place: int) -> dict[str, Score]:
        """Scores by type (0) or source (1)."""
        groups: dict[str, list[Answer]] = {}
        for answer in answers:
            groups.setdefault((answer.type, answer.source)[place], []).append(answer)
        return {
            name: _with_loss(score(groups[name]), [loss for key, loss in (losses or {}).items() if key[place] == name])
            for name in sorted(groups)
        }

    return Result(_with_loss(score(answers), [*(losses or {}).values()]), by(0), by(1))


def _with_loss(score: Score, losses: list[Loss]) -> Score:
    if not losses:
        return score
    loss = Loss(sum(loss.summed for loss in losses), sum(loss.tokens for loss in losses))
    return replace(score, loss=loss.mean, perplexity=loss.perplexity)


def score(answers: list[Answer]) -> Score:
    """Compute the scores of a non-empty list of answers."""
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    accuracy, low, high = accuracy_interval(answers)
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
        daquar=_daquar(texts, references) if all("daquar" in answer.source.lower() for answer in answers) else None,
    )


def _daquar(texts: list[str], references: list[tuple[str, ...]]) -> dict[str, float | None]:
    """Scores of DAQUAR, whose answers are lists of things. A source is DAQUAR's if its name says so."""
    nouns = find_nouns()
    return {
        "accuracy": sum(map(metrics.daquar_accuracy, texts, references)) / len(texts),
        "wups_0.9": None if nouns is None else sum(map(partial(wups, nouns=nouns), texts, references)) / len(texts),
    }


def accuracy_interval(answers: list[Answer]) -> Interval:
    """Mean accuracy and its 95 % interval."""
    return interval(_accuracies(answers), _photos_of(answers))


def accuracy_difference(first: list[Answer], second: list[Answer]) -> Interval:
    """Mean accuracy of `first` less that of `second`, and its 95 % interval; both answer the same questions."""
    return difference(_accuracies(first), _accuracies(second), _photos_of(first))


def visual_gain(trained: list[Answer], blind: list[Answer]) -> Interval | None:
    """Accuracy with the photo less accuracy with another one, and its 95 % interval; None: no question has a photo.

    Args:
        trained, blind: answers to the same questions. Text-only questions do not count.
    """
    pairs = [pair for pair in zip(trained, blind, strict=True) if pair[0].images]
    return accuracy_difference(*map(list, zip(*pairs, strict=True))) if pairs else None


def _accuracies(answers: list[Answer]) -> Tally:
    return mean_tally([answer.accuracy for answer in answers])


def _photos_of(answers: list[Answer]) -> list[Hashable]:
    """Key of each answer's (first) photo; a text-only question has a key of its own."""
    return [answer.images[0] if answer.images else (number,) for number, answer in enumerate(answers)]
