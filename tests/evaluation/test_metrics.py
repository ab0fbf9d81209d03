"""Normalisation and scores, against values worked out by hand or with the official formulas."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# Worked out by hand from the rules that `vqa_normalise` states; vqaEval.py itself is not run here.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "dog"),
        ("a", ""),
        ("one of ten", "1 of 10"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've he'dve", "couldn't've he'd've"),
        ("couldntve", "couldntve"),  # two apostrophes missing
        ("Whats that", "what's that"),
        ("its", "its"),  # a word of its own, as "were", "well", "id" are
        ("men's", "men's"),  # unlike `normalise`: an apostrophe stays
        ("yall'll", "y'all'll"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("top-left - no", "topleft no"),  # one hyphen has spaces, so both go
        ("yes!", "yes"),
        ("yes,no", "yes no"),
        ("1,000", "1000"),
        ("t-shirt, 1,000", "tshirt 1000"),  # a comma between digits, so all punctuation goes
        ("3.5", "3.5"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("5. street", "5 street"),
        ("10:30", "10:30"),
        ("$5 & 50%", "$5 & 50%"),
        ("on the\ntable", "on table"),
        ("", ""),
    ],
)
def test_vqa_normalise(text, expected):
    assert metrics.vqa_normalise(text) == expected


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_equals_the_mean_over_all_nine_of_ten(agreeing, expected):
    references = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    subsets = list(itertools.combinations(references, 9))
    official = sum(min(1.0, subset.count("yes") / 3) for subset in subsets) / len(subsets)
    assert metrics.vqa_accuracy("yes", references) == pytest.approx(expected) == pytest.approx(official)


def test_vqa_accuracy_normalises_officially():
    assert metrics.vqa_accuracy("U.S.", ["us"] * 3 + ["usa"] * 7) == pytest.approx(0.9)
    assert metrics.vqa_accuracy("dont", ["don't"] * 2 + ["no"] * 8) == pytest.approx(0.6)
    assert metrics.vqa_accuracy("mens", ["men's"] * 9 + ["women"]) == 0.0


def test_vqa_accuracy_takes_texts_as_they_are_if_all_annotators_agree():
    assert metrics.vqa_accuracy("yes\n", ["yes "] * 10) == 1.0
    assert metrics.vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert metrics.vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_vqa_accuracy_knows_chinese():
    assert metrics.vqa_accuracy("红色。", ["红色"] * 10) == 1.0
    assert metrics.vqa_accuracy("红色，", ["红色"] * 2 + ["蓝色"] * 8) == pytest.approx(0.6)


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


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("ab", ["ac"], 0.0),  # a half is not above the threshold
        ("abc", ["abd"], 2 / 3),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("出口在左边", ["出口在右边"], 4 / 5),
    ],
)
def test_anls_by_hand(answer, references, expected):
    assert metrics.anls(answer, references) == pytest.approx(expected)


@given(st.text(alphabet="abA 一", max_size=8), st.text(alphabet="abA 一", max_size=8))
def test_anls_is_symmetrical_and_full_for_the_same_text(first, second):
    assert metrics.anls(first, [first]) == 1.0
    assert metrics.anls(first, [second]) == metrics.anls(second, [first])
    assert metrics.anls(first, [second, first]) == metrics.anls(first, [first, second]) == 1.0


def test_daquar_accuracy_compares_lists_in_any_order():
    assert metrics.daquar_accuracy("night stand, the book", ["book, night_stand"]) == 1.0
    assert metrics.daquar_accuracy("book", ["book, night_stand"]) == 0.0
    assert metrics.daquar_accuracy("book, night_stand", ["book"]) == 0.0
    assert metrics.daquar_accuracy("two", ["white", "2"]) == 1.0
    assert metrics.daquar_accuracy("", ["2"]) == 0.0
