"""How sure a score is: bootstrap intervals over photos, of one score and of the difference of two.

Questions on one photo are right or wrong together, so what is drawn anew is photos, not questions. Every score is a
formula of sums over answers (`Tally`), so that a resample costs one product of a vector and a matrix.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Tally:
    """What one score is computed from.

    Attributes:
        rows: (answers, K) float64, K statistics of each answer.
        formula: (…, K) sums over answers → (…) scores.
    """

    rows: np.ndarray
    formula: Callable[[np.ndarray], np.ndarray]

    @property
    def score(self) -> float:
        """The score of all answers together."""
        return float(self.formula(self.rows.sum(axis=0)))


def mean_tally(values: Sequence[float]) -> Tally:
    """Tally of a score that is the mean of a value per answer, such as accuracy or CIDEr-D."""
    rows = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Tally(rows, lambda sums: sums[..., 0] / sums[..., 1])


class Interval(NamedTuple):
    """A score of all answers, and the ends of its 95 % interval."""

    score: float
    low: float
    high: float


def interval(tally: Tally, photos: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile bootstrap interval of a score.

    Source: Efron and Tibshirani 1993, chapter 13; photos as clusters: Davison and Hinkley 1997, section 3.8.

    Args:
        tally: statistics of the answers.
        photos: key of each answer's photo, equal for answers on one photo. A question without a photo needs a key of
            its own.
        seed: same seed and same photos, same resamples.
    """
    return _ends(tally.score, _scores(tally, photos, seed, resamples))


def difference(
    first: Tally, second: Tally, photos: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """95 % interval of `first` − `second` on the same questions: both are scored on the same resampled photos.

    If the interval does not contain 0, the systems differ. Arguments are those of `interval`; row i of both tallies is
    question i.
    """
    assert len(first.rows) == len(second.rows)
    scores = _scores(first, photos, seed, resamples) - _scores(second, photos, seed, resamples)
    return _ends(first.score - second.score, scores)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: are the questions that only one system answers right shared half and half?

    Source: McNemar 1947, with the binomial distribution in place of chi-squared. Questions count as independent, so
    with many questions per photo p is too small: believe `difference` then.

    Args:
        first: whether the first system was right, per question.
        second: the same of the second system.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    flipped = only_first + only_second
    tail, ways = 0, 1  # `ways` is the binomial coefficient of `count` out of `flipped`
    for count in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (flipped - count) // (count + 1)
    return min(1.0, 2 * tail / 2**flipped)


def _scores(tally: Tally, photos: Sequence[Hashable], seed: int, resamples: int) -> np.ndarray:
    """Scores (resamples,) on photos drawn with replacement."""
    assert len(photos) == len(tally.rows) > 0
    numbers: dict[Hashable, int] = {}
    groups = [numbers.setdefault(photo, len(numbers)) for photo in photos]
    sums = np.zeros((len(numbers), tally.rows.shape[1]))  # (photos, K)
    np.add.at(sums, groups, tally.rows)
    drawn = np.stack([times @ sums for times in _draws(len(sums), seed, resamples)])  # (resamples, K)
    return tally.formula(drawn)


def _draws(photos: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each photo was drawn: `resamples` arrays of shape (photos,)."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(photos, size=photos), minlength=photos)


def _ends(score: float, scores: np.ndarray) -> Interval:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(score, float(low), float(high))
