"""How texts are cut into words."""

import pytest

from evaluation.words import characters, cuts, english_words, jieba_words, mostly_chinese


# Expected: Stanford CoreNLP 3.4.1's PTBTokenizer with the options and the punctuation list of the COCO scorer.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A black/white dog.", "a black/white dog"),
        ("It costs $3.50, or 2,000 in total!", "it costs $ 3.50 or 2,000 in total"),
        ("He can't, won't and cannot go; gonna, gotta, wanna, lemme, gimme.",
         "he ca n't wo n't and can not go gon na got ta wan na lem me gim me"),
        ("The dog's owner said \"hi\" to 'him'.", "the dog 's owner said hi to him"),
        ("A woman 's face", "a woman 's face"),
        ("it’s a dog’s “life”", "it 's a dog 's life"),
        ("Mr. Smith vs. the U.S. team at 3 p.m.", "mr. smith vs. the u.s. team at 3 p.m."),
        ("A man.A dog", "a man.a dog"),
        ("rock & roll, R&B, AT&T", "rock & roll r&b at&t"),
        ("50% off at 10:30", "50 % off at 10:30"),
        ("The boys' dog", "the boys dog"),
        ("I'm, you're, we've, they'll, he'd", "i 'm you 're we 've they 'll he 'd"),
        ("the dog – a big one — ran… away", "the dog a big one ran away"),
        ("half-eaten e-mail -dash- dash-", "half-eaten e-mail dash dash"),
        ("dog,cat hello...world top -left", "dog cat hello world top left"),
        ("Café # 8, o'clock ma'am", "café # 8 o'clock ma'am"),
    ],
)  # fmt: skip
def test_english_words_are_those_of_the_coco_scorer(text, expected):
    assert english_words(text) == expected.split()


def test_characters_keep_latin_words_whole():
    assert characters("一只Dog在跑，２个人。《！》 T-shirt") == [
        "一",
        "只",
        "dog",
        "在",
        "跑",
        "2",
        "个",
        "人",
        "t-shirt",
    ]


def test_jieba_words_have_no_punctuation():
    pytest.importorskip("jieba")
    assert jieba_words("一个女孩，在公园里跑步。") == ["一个", "女孩", "在", "公园", "里", "跑步"]


def test_what_is_chinese():
    assert all(map(mostly_chinese, (["一个女孩在公园里跑步。"], ["T恤"], ["iPhone手机"], ["3只狗", "三只狗"])))
    assert not any(map(mostly_chinese, (["a girl in a T恤"], ["The sign says 出口."], ["3"], ["?!"], [""])))


def test_cuts_suit_the_language(monkeypatch):
    chinese = [["一个女孩在公园里跑步。", "女孩跑步"], ["T恤"]]
    assert cuts([["a girl in a T恤"], ["3"]]) == {"words": [english_words] * 2}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuts(chinese) == {"characters": [characters] * 2}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert cuts(chinese) == {"characters": [characters] * 2, "jieba": [jieba_words] * 2}


def test_each_answer_is_cut_by_the_language_of_its_own_references(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    mixed = [["A girl runs.", "One girl"], ["一个女孩在跑步。"], ["a red shirt"]]
    for english_first in (mixed, mixed[:1] * 9 + mixed[1:]):  # whichever language has more text
        found = cuts(english_first)
        rest = len(english_first) - 2
        assert found["characters"] == [*[english_words] * rest, characters, english_words]
        assert found["jieba"] == [*[english_words] * rest, jieba_words, english_words]
