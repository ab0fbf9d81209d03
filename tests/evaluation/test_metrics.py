"""Normalisation and scores, against values worked out by hand or with the official formulas."""

import itertools

import pytest

from evaluation import metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red  ball.", "red ball"),
        ("ＲＥＤ，ball！", "red ball"),
        ("红色的 球。", "红色的球"),
        ("图中有 2 只猫", "图中有2只猫"),
        ("two", "2"),
        ("1,000 people", "1000 people"),
        ("about 3.5 m.", "about 3.5 m"),
        ("50%", "50%"),
        ("it's top-left", "its top left"),
        ("A", "a"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert metrics.normalise(text) == expected


def test_exact_match_takes_any_reference():
    assert metrics.exact_match("Two.", ["one", "2"]) == 1.0
    assert metrics.exact_match("three", ["one", "2"]) == 0.0
    assert metrics.exact_match("", ["A"]) == 0.0


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_equals_the_mean_over_all_nine_of_ten(agreeing, expected):
    references = ["Yes"] * agreeing + ["no"] * (10 - agreeing)
    subsets = list(itertools.combinations(references, 9))
    official = sum(min(1.0, subset.count("Yes") / 3) for subset in subsets) / len(subsets)
    assert metrics.vqa_accuracy("yes", references) == pytest.approx(expected) == pytest.approx(official)


def test_accuracy_is_soft_from_ten_references_on():
    assert metrics.accuracy("yes", ["yes"] + ["no"] * 9) == pytest.approx(0.3)
    assert metrics.accuracy("yes", ["yes"] + ["no"] * 8) == 1.0
    with pytest.raises(ValueError, match="at least one answer"):
        metrics.accuracy("yes", [])


def test_token_f1():
    assert metrics.token_f1("a red ball", ["the red cube"]) == pytest.approx(0.5)
    assert metrics.token_f1("红球", ["红色的球"]) == pytest.approx(2 * 2 / (2 + 4))
    assert metrics.token_f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert metrics.token_f1("blue", ["red", "blue"]) == 1.0
    assert metrics.token_f1("", ["red"]) == 0.0


def test_corpus_scores_reward_any_reference_and_know_chinese():
    references = [["a red ball lies on the table"], ["x", "two dogs run over the wet grass"]]
    same = ["a red ball lies on the table", "two dogs run over the wet grass"]
    assert metrics.corpus_bleu(same, references) == pytest.approx(100)
    assert metrics.corpus_chrf(same, references) == pytest.approx(100)
    assert metrics.corpus_bleu(["nothing alike here at all", "no"], references) < 5
    assert metrics.corpus_bleu(["red", "two"], [["red"], ["two"]]) == pytest.approx(100)
    # one wrong character of ten: by characters some 4-grams agree, by white space there would be one wrong word
    assert metrics.corpus_bleu(["一个女孩在公园里跑步"], [["一个男孩在公园里跑步"]]) > 60
