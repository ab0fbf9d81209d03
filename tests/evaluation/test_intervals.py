"""Bootstrap intervals over photos, paired comparison and McNemar's test."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.captions import caption_tallies
from evaluation.intervals import Tally, difference, interval, mcnemar, mean_tally

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def test_interval_of_a_share_is_that_of_the_normal_approximation():
    """400 photos, 30 % right: 0.3 ± 1.96 √(0.3 · 0.7 / 400). Tolerance: 1,000 resamples give an end ± 0.004."""
    values = [1.0] * 120 + [0.0] * 280
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    score, low, high = interval(mean_tally(values), range(400))
    assert score == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.006)


def test_photos_are_drawn_not_questions():
    """Nine more questions on each photo that are right together tell nothing new."""
    values = [1.0] * 30 + [0.0] * 70
    alone = interval(mean_tally(values), range(100))
    repeated = interval(mean_tally(values * 10), list(range(100)) * 10)
    assert repeated == pytest.approx(alone)
    as_if_apart = interval(mean_tally(values * 10), range(1000))
    assert as_if_apart.high - as_if_apart.low < 0.5 * (alone.high - alone.low)


def test_photos_with_more_questions_weigh_more():
    """A resample of photos a (one right) and b (three wrong) is aa, ab or bb: 1, 1/4 or 0."""
    score, low, high = interval(mean_tally([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"])
    assert (score, low, high) == (0.25, 0.0, 1.0)


def test_corpus_scores_are_computed_anew_from_sums():
    """Each resample of the tally equals the score of the resampled corpus itself."""
    answers = ["a dog runs", "two men climb a rock", "a red bus in the rain"]
    references = [["a dog runs fast"], ["two men climb a hill"], ["the red bus", "a bus in the rain"]]
    tally = caption_tallies(answers, references)["bleu_2"]
    generator = np.random.default_rng(3)
    scores = []
    for _ in range(50):
        drawn = generator.integers(3, size=3)
        again = caption_tallies([answers[i] for i in drawn], [references[i] for i in drawn])["bleu_2"]
        scores.append(again.score)
    result = interval(tally, "abc", seed=3, resamples=50)
    assert result[1:] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-12)


@given(SCORES, st.integers(0, 5))
def test_interval_is_repeatable_and_within_the_values(values, seed):
    photos = [number % 7 for number in range(len(values))]
    first = interval(mean_tally(values), photos, seed=seed, resamples=50)
    assert first == interval(mean_tally(values), photos, seed=seed, resamples=50)
    assert min(values) - 1e-12 <= first.low <= first.high <= max(values) + 1e-12


def test_difference_is_paired():
    """A system that is better by 0.02 on every photo differs for sure, however much photos vary among themselves."""
    base = np.random.default_rng(0).random(60) * 0.9
    better, worse = mean_tally(list(base + 0.02)), mean_tally(list(base))
    assert difference(better, worse, range(60)) == pytest.approx((0.02, 0.02, 0.02))
    apart = interval(better, range(60))
    assert apart.low < worse.score < apart.high
    assert difference(worse, worse, range(60)) == (0.0, 0.0, 0.0)


def test_difference_agrees_with_the_interval_of_differences():
    generator = np.random.default_rng(1)
    first, second = generator.random(40), generator.random(40)
    photos = [number // 2 for number in range(40)]
    paired = difference(mean_tally(list(first)), mean_tally(list(second)), photos, seed=5)
    assert paired == pytest.approx(interval(mean_tally(list(first - second)), photos, seed=5))


def test_tally_takes_any_formula_of_sums():
    rows = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert Tally(rows, lambda sums: sums[..., 0] / sums[..., 1]).score == 1.0


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (2, 8, 2 * (1 + 10 + 45) / 1024), (5, 5, 1.0)],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    """Twice the chance of at most so many heads in as many throws as there are flipped answers, at most 1."""
    first = [True] * only_first + [False] * only_second + [True, False] * 4
    second = [False] * only_first + [True] * only_second + [True, False] * 4
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_many_answers_does_not_overflow():
    assert mcnemar([True] * 2100 + [False] * 1900, [False] * 2100 + [True] * 1900) == pytest.approx(0.00165, abs=2e-5)
    assert mcnemar([True] * 4000, [False] * 4000) == 0.0
