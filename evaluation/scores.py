"""Scores of the answers of one pass: in all, by question type and by source.

Answers of a few words are right or wrong, so accuracy judges them. No caption is word for word like a reference, so
CIDEr-D judges sentences: in tables, in intervals, and when answers with and without the photo are compared.
"""

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from evaluation import captions, metrics
from evaluation.intervals import Interval, difference, interval, mean_tally
from evaluation.losses import Loss
from evaluation.runner import Answer
from evaluation.words import cuts
from evaluation.wups import find_nouns, wups

# Most words of a reference, or Chinese characters, that an answer can be expected to equal: 89 % of VQA's answers have
# one word and few have more than three (Antol et al. 2015, section 4), while half of Flickr8k's captions have ten words
# or more, and half of the Chinese ones eight characters or more (median of the training split).
ANSWER_WORDS = 5

# as reports call the scores of `captions.caption_scores`
CAPTION_SCORES = {f"bleu_{order}": f"BLEU-{order}" for order in range(1, captions.ORDERS + 1)} | {
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
}


@dataclass(frozen=True)
class Score:
    """Scores of `questions` questions: accuracy, token F1 and ANLS in 0..1, BLEU-4 and chrF in 0..100.

    Attributes:
        accuracy_interval: ends of its 95 % interval, by resampled photos.
        cider_d_interval: the same of CIDEr-D; None where accuracy judges.
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
    cider_d_interval: tuple[float, float] | None = None
    loss: float | None = None
    perplexity: float | None = None

    @property
    def judged(self) -> Interval:
        """CIDEr-D where it judges, else accuracy."""
        if self.cider_d_interval is None:
            return Interval(self.accuracy, *self.accuracy_interval)
        return Interval(next(iter(self.captions.values()))["cider_d"], *self.cider_d_interval)


@dataclass(frozen=True)
class Result:
    """Scores of one pass."""

    overall: Score
    by_type: dict[str, Score]
    by_source: dict[str, Score]


Losses = Mapping[tuple[str, str], Loss]  # by question type and source
PhotoOf = Mapping[tuple[int, int], int]  # number of an entry and of its turn → ID of its first photo


def are_sentences(references: Iterable[str]) -> bool:
    """Whether at least half of the references are longer than `ANSWER_WORDS`."""
    texts = list(references)
    cut = next(iter(cuts(texts).values()))
    return statistics.median(len(cut(text)) for text in texts) > ANSWER_WORDS


def score_pass(
    answers: list[Answer], losses: Losses | None = None, sentences: bool = False, photos: PhotoOf | None = None
) -> Result:
    """Score a non-empty list of answers.

    Args:
        losses: of the same questions.
        sentences: whether CIDEr-D judges.
        photos: of the questions, for answers that were given without them.
    """

    def by(place: int) -> dict[str, Score]:
        """Scores by type (0) or source (1)."""
        groups: dict[str, list[Answer]] = {}
        for answer in answers:
            groups.setdefault((answer.type, answer.source)[place], []).append(answer)
        return {
            name: _with_loss(
                score(groups[name], sentences, photos),
                [loss for key, loss in (losses or {}).items() if key[place] == name],
            )
            for name in sorted(groups)
        }

    return Result(_with_loss(score(answers, sentences, photos), [*(losses or {}).values()]), by(0), by(1))


def _with_loss(score: Score, losses: list[Loss]) -> Score:
    if not losses:
        return score
    loss = Loss(sum(loss.summed for loss in losses), sum(loss.tokens for loss in losses))
    return replace(score, loss=loss.mean, perplexity=loss.perplexity)


def score(answers: list[Answer], sentences: bool, photos: PhotoOf | None = None) -> Score:
    """Compute the scores of a non-empty list of answers; with `sentences`, CIDEr-D judges."""
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    accuracy, low, high = judged(answers, sentences=False, photos=photos)
    daquar = _daquar(answers)
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
        daquar=None
        if daquar is None
        else {name: None if own is None else sum(own) / len(own) for name, own in daquar.items()},
        cider_d_interval=judged(answers, sentences, photos)[1:] if sentences else None,
    )


def all_intervals(answers: list[Answer]) -> dict[str, Interval]:
    """Every score that is a formula of sums over answers, with its 95 % interval; name → score.

    Chinese has the scores of captions once for each way to cut it into words. Not there: sacrebleu's BLEU and chrF, and
    the loss.
    """
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    tallies = {"accuracy": mean_tally([answer.accuracy for answer in answers])}
    for name, measure in (("F1", metrics.token_f1), ("ANLS", metrics.anls)):
        tallies[name] = mean_tally(list(map(measure, texts, references)))
    ways = cuts(text for own in references for text in own)
    for way, cut in ways.items():
        end = f", {way}" if len(ways) > 1 else ""
        for name, tally in captions.caption_tallies(texts, references, cut).items():
            tallies[f"{CAPTION_SCORES[name]}{end}"] = tally
    for name, values in (_daquar(answers) or {}).items():
        if values is not None:
            tallies[{"accuracy": "DAQUAR", "wups_0.9": "WUPS"}[name]] = mean_tally(values)
    photos = _photos_of(answers)
    return {name: interval(tally, photos) for name, tally in tallies.items()}


def _daquar(answers: list[Answer]) -> dict[str, list[float] | None] | None:
    """Scores of each answer to DAQUAR, whose answers are lists of things. A source is DAQUAR's if its name says so."""
    if not all("daquar" in answer.source.lower() for answer in answers):
        return None
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    nouns = find_nouns()
    return {
        "accuracy": list(map(metrics.daquar_accuracy, texts, references)),
        "wups_0.9": None if nouns is None else list(map(partial(wups, nouns=nouns), texts, references)),
    }


def judged(answers: list[Answer], sentences: bool, photos: PhotoOf | None = None) -> Interval:
    """Mean of `judge_values`, and its 95 % interval."""
    return interval(mean_tally(judge_values(answers, sentences)), _photos_of(answers, photos))


def judged_difference(pairs: Sequence[tuple[Answer, Answer]], sentences: bool) -> Interval:
    """Mean of `judge_values` of the first answers less that of the second to the same questions; its 95 % interval."""
    first, second = ([pair[place] for pair in pairs] for place in (0, 1))
    tallies = [mean_tally(judge_values(answers, sentences)) for answers in (first, second)]
    return difference(tallies[0], tallies[1], _photos_of(first))


def visual_gain(trained: list[Answer], blind: list[Answer], sentences: bool = False) -> Interval | None:
    """`judged_difference` between answers with the photo and with another one; None: no question has a photo.

    Args:
        trained, blind: answers to the same questions. Text-only questions do not count.
    """
    pairs = [pair for pair in zip(trained, blind, strict=True) if pair[0].images]
    return judged_difference(pairs, sentences) if pairs else None


def judge_values(answers: list[Answer], sentences: bool) -> list[float]:
    """Accuracy of each answer, or its CIDEr-D among these answers if they are to be `sentences`."""
    if not sentences:
        return [answer.accuracy for answer in answers]
    cut = next(iter(cuts(text for answer in answers for text in answer.references).values()))
    return captions.cider_d(
        [cut(answer.answer) for answer in answers], [[*map(cut, answer.references)] for answer in answers]
    )


def _photos_of(answers: list[Answer], photos: PhotoOf | None = None) -> list[Hashable]:
    """Key of each answer's (first) photo, or of its question's in `photos`; a text-only question has one of its own."""
    known = photos or {}
    return [
        answer.images[0] if answer.images else known.get((answer.entry, answer.turn), (number,))
        for number, answer in enumerate(answers)
    ]
