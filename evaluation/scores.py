"""Scores of the answers of one pass: in all, by question type and by source.

Answers of a few words are right or wrong, so accuracy judges them. No caption is word for word like a reference, so
CIDEr-D judges sentences: in tables, in intervals, and when answers with and without the photo are compared. Which of
the two a source has is decided for each source. Where many of both stand together, one score must mean the same for
each answer and depend on no other: F1 judges, the share of words that an answer and its best reference have in common.
"""

import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from evaluation import captions, metrics
from evaluation.intervals import Interval, difference, interval, mean_tally
from evaluation.losses import Loss
from evaluation.runner import Answer
from evaluation.words import Cut, characters, cuts, english_words, mostly_chinese
from evaluation.wups import find_nouns, wups

# Most words of a reference, or Chinese characters, that an answer can be expected to equal: 89 % of VQA's answers have
# one word and few have more than three (Antol et al. 2015, section 4), while half of Flickr8k's captions have ten words
# or more, and half of the Chinese ones eight characters or more (median of the training split).
ANSWER_WORDS = 5

FEW = 0.1  # share of sentences among short answers that accuracy still judges: they lower it by no more than that

# as reports call the scores that may judge, and those of `captions.caption_scores`
ACCURACY, CIDER_D, F1 = "accuracy", "CIDEr-D", "F1"
CAPTION_SCORES = {f"bleu_{order}": f"BLEU-{order}" for order in range(1, captions.ORDERS + 1)} | {
    "rouge_l": "ROUGE-L",
    "cider_d": CIDER_D,
}


@dataclass(frozen=True)
class Score:
    """Scores of `questions` questions: accuracy, token F1 and ANLS in 0..1, BLEU-4 and chrF in 0..100.

    Attributes:
        accuracy_interval: ends of its 95 % interval, by resampled photos.
        captions: how texts are cut into words → scores of `captions.caption_scores`.
        measure: which of the scores judges, see `measure_of`.
        measure_interval: ends of its 95 % interval.
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
    measure: str
    measure_interval: tuple[float, float]
    loss: float | None = None
    perplexity: float | None = None

    @property
    def judged(self) -> Interval:
        """The score that judges."""
        cider_d = next(iter(self.captions.values()))["cider_d"]
        score = {ACCURACY: self.accuracy, CIDER_D: cider_d, F1: self.token_f1}[self.measure]
        return Interval(score, *self.measure_interval)


@dataclass(frozen=True)
class Result:
    """Scores of one pass."""

    overall: Score
    by_type: dict[str, Score]
    by_source: dict[str, Score]


Losses = Mapping[tuple[str, str], Loss]  # by question type and source
PhotoOf = Mapping[tuple[int, int], int]  # number of an entry and of its turn → ID of its first photo


def are_sentences(references: Iterable[str]) -> bool:
    """Whether at least half of the references are longer than `ANSWER_WORDS`, each cut by its own language."""
    lengths = [len((characters if mostly_chinese([text]) else english_words)(text)) for text in references]
    return statistics.median(lengths) > ANSWER_WORDS


def sentence_sources(answers: Iterable[Answer]) -> frozenset[str]:
    """The sources whose true answers are sentences; the others have answers of a few words."""
    references: dict[str, list[str]] = {}
    for answer in answers:
        references.setdefault(answer.source, []).extend(answer.references)
    return frozenset(source for source, texts in references.items() if are_sentences(texts))


def measure_of(answers: Collection[Answer], sentences: Collection[str]) -> str:
    """Name of the score that judges these answers: accuracy, of sentences CIDEr-D, of both together F1.

    Args:
        sentences: of `sentence_sources`.
    """
    share = sum(answer.source in sentences for answer in answers) / len(answers)
    return ACCURACY if share <= FEW else CIDER_D if share == 1 else F1


def score_pass(
    answers: list[Answer],
    losses: Losses | None = None,
    sentences: Collection[str] = (),
    photos: PhotoOf | None = None,
) -> Result:
    """Score a non-empty list of answers.

    Args:
        losses: of the same questions.
        sentences: of `sentence_sources`.
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


def score(answers: list[Answer], sentences: Collection[str], photos: PhotoOf | None = None) -> Score:
    """Compute the scores of a non-empty list of answers; arguments as `score_pass`."""
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    accuracy, low, high = judged(answers, ACCURACY, photos)
    measure = measure_of(answers, sentences)
    daquar = _daquar(answers)
    return Score(
        questions=len(answers),
        accuracy=accuracy,
        accuracy_interval=(low, high),
        token_f1=sum(map(metrics.token_f1, texts, references)) / len(answers),
        bleu4=captions.corpus_bleu(texts, references),
        chrf=captions.corpus_chrf(texts, references),
        anls=sum(map(metrics.anls, texts, references)) / len(answers),
        captions={way: captions.caption_scores(*_cut_texts(answers, own)) for way, own in cuts(references).items()},
        daquar=None
        if daquar is None
        else {name: None if own is None else sum(own) / len(own) for name, own in daquar.items()},
        measure=measure,
        measure_interval=(low, high) if measure == ACCURACY else judged(answers, measure, photos)[1:],
    )


def all_intervals(answers: list[Answer]) -> dict[str, Interval]:
    """Every score that is a formula of sums over answers, with its 95 % interval; name → score.

    Chinese has the scores of captions once for each way to cut it into words. Not there: sacrebleu's BLEU and chrF, and
    the loss.
    """
    texts = [answer.answer for answer in answers]
    references = [answer.references for answer in answers]
    tallies = {name: mean_tally(judge_values(answers, name)) for name in (ACCURACY, F1)}
    tallies["ANLS"] = mean_tally(list(map(metrics.anls, texts, references)))
    ways = cuts(references)
    for way, own in ways.items():
        end = f", {way}" if len(ways) > 1 else ""
        for name, tally in captions.caption_tallies(*_cut_texts(answers, own)).items():
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


def judged(answers: list[Answer], measure: str, photos: PhotoOf | None = None) -> Interval:
    """Mean of `judge_values`, and its 95 % interval."""
    return interval(mean_tally(judge_values(answers, measure)), _photos_of(answers, photos))


def judged_difference(pairs: Sequence[tuple[Answer, Answer]], measure: str) -> Interval:
    """Mean of `judge_values` of the first answers less that of the second to the same questions; its 95 % interval."""
    first, second = ([pair[place] for pair in pairs] for place in (0, 1))
    tallies = [mean_tally(judge_values(answers, measure)) for answers in (first, second)]
    return difference(tallies[0], tallies[1], _photos_of(first))


def visual_gain(trained: list[Answer], blind: list[Answer], measure: str) -> Interval | None:
    """`judged_difference` between answers with the photo and with another one; None: no question has a photo.

    Args:
        trained, blind: answers to the same questions. Text-only questions do not count.
    """
    pairs = [pair for pair in zip(trained, blind, strict=True) if pair[0].images]
    return judged_difference(pairs, measure) if pairs else None


def judge_values(answers: list[Answer], measure: str) -> list[float]:
    """What `measure` (accuracy, F1 or CIDEr-D) gives each answer; CIDEr-D is among these answers."""
    if measure == ACCURACY:
        return [answer.accuracy for answer in answers]
    if measure == F1:
        return [metrics.token_f1(answer.answer, answer.references) for answer in answers]
    assert measure == CIDER_D
    return captions.cider_d(*_cut_texts(answers, next(iter(cuts([answer.references for answer in answers]).values()))))


def _cut_texts(answers: list[Answer], own: Sequence[Cut]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words of the answers and of their references; `own` is the cut of each answer."""
    return (
        [cut(answer.answer) for cut, answer in zip(own, answers, strict=True)],
        [[*map(cut, answer.references)] for cut, answer in zip(own, answers, strict=True)],
    )


def _photos_of(answers: list[Answer], photos: PhotoOf | None = None) -> list[Hashable]:
    """Key of each answer's (first) photo, or of its question's in `photos`; a text-only question has one of its own."""
    known = photos or {}
    return [
        answer.images[0] if answer.images else known.get((answer.entry, answer.turn), (number,))
        for number, answer in enumerate(answers)
    ]
