"""Caption scores: equal to the COCO scorer's on the same words, and what must hold for any texts.

The constants were computed with pycocoevalcap 1.2 (`Bleu(4)`, `Cider()`, `Rouge()`) on the words of `english_words`.
"""

import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.world import random_scene
from evaluation.captions import caption_scores, caption_tallies, cider_d, corpus_bleu, corpus_chrf, rouge_l
from evaluation.intervals import interval
from evaluation.words import characters, english_words
from paths import REPO_ROOT

# answer, references: exact, nearly right, wrong, repeated words, shorter and longer than all references, empty
CAPTIONS = [
    ("A dog runs along the beach.", ["A dog runs along the beach.", "A brown dog is running on sand.",
     "Dog at the sea"]),
    ("a man in a red shirt", ["A man wearing a red shirt climbs a rock.", "A climber on a steep rock.",
     "A man climbs."]),
    ("two dogs play with a ball in the grass", ["Two dogs chase a ball on the grass.", "The dogs are playing.",
     "Two puppies fight for a yellow ball.", "Dogs in a green field."]),
    ("a boy a boy a boy a boy", ["A boy jumps into a pool.", "A young boy dives.", "The boy's feet leave the board."]),
    ("snow", ["A skier goes down a snowy hill.", "Someone on skis in the snow.", "A person skiing downhill, fast."]),
    ("a group of people standing in front of a very large old building on a sunny day in the middle of the city",
     ["People wait before a church.", "A crowd in front of a building.", "Several tourists look at an old building."]),
    ("a woman holds an umbrella", ["A plane lands at dusk.", "An airplane above the runway.", "The jet touches down."]),
    ("", ["A child on a swing.", "A little girl swings in the park.", "The girl is laughing on a swing."]),
    ("A white t-shirt, a child's, doesn't dry.", ["A child's white t-shirt hangs on a line.", "It doesn't dry well.",
     "Laundry on a line: a white t-shirt.", "A shirt dries.", "Washing day."]),
    ("the cat sleeps on the sofa", ["The cat sleeps on the couch.", "A cat sleeps on the sofa.", "A cat naps."]),
    ("a red bus drives past the shop", ["A red double-decker bus in London.", "The bus passes a shop.", "A red bus."]),
    ("two men ride bicycles down a hill", ["Two men ride bikes down a hill.", "Cyclists on a mountain path.",
     "Two men on bicycles race downhill.", "Men ride their bicycles.", "A bicycle race."]),
]  # fmt: skip
ANSWERS, REFERENCES = [list(column) for column in zip(*CAPTIONS, strict=True)]
BLEU = [0.678160919532435, 0.5426459340980119, 0.42329781899287133, 0.31204126249858255]
ROUGE_L = [1.0, 0.726190476190476, 0.7134502923976607, 0.43990384615384615, 0.25311203319502074, 0.4425634824667472,
           0.2, 0.0, 0.524731182795699, 0.8333333333333334, 0.646643109540636, 0.8571428571428571]  # fmt: skip
CIDER_D = [3.78917893980174, 1.5091969270351224, 1.0970737814777876, 0.3608810255144384, 0.3303602672520748,
           0.028956979932694662, 0.12262767326728792, 0.0, 1.3985328537836503, 5.34282452755993, 1.8574808351409469,
           1.7189262974928008]  # fmt: skip

# The formulas are the same; sums in another order differ in the last of 16 digits.
BLEU_TOLERANCE = ROUGE_TOLERANCE = 1e-9
CIDER_TOLERANCE = 1e-6


def cut_all(references, cut=english_words):
    return [[cut(text) for text in texts] for texts in references]


def scores_of(answers, references, cut=english_words):
    return caption_scores(list(map(cut, answers)), cut_all(references, cut))


def test_scores_are_those_of_the_coco_scorer():
    scores = scores_of(ANSWERS, REFERENCES)
    assert list(scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    assert [scores[f"bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx(BLEU, abs=BLEU_TOLERANCE)
    assert scores["rouge_l"] == pytest.approx(sum(ROUGE_L) / len(ROUGE_L), abs=ROUGE_TOLERANCE)
    assert scores["cider_d"] == pytest.approx(sum(CIDER_D) / len(CIDER_D), abs=CIDER_TOLERANCE)


def test_each_answer_scores_as_in_the_coco_scorer():
    words = list(map(english_words, ANSWERS))
    assert list(map(rouge_l, words, cut_all(REFERENCES))) == pytest.approx(ROUGE_L, abs=ROUGE_TOLERANCE)
    assert cider_d(words, cut_all(REFERENCES)) == pytest.approx(CIDER_D, abs=CIDER_TOLERANCE)


def drawn_captions():
    """Five English captions of each of 100 drawn scenes: its objects in random order, one or two left out."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        sentences = [f"there is a {thing.size} {thing.name} in the {thing.place}" for thing in random_scene(rng)]
        yield [" and ".join(rng.permutation(sentences)[: rng.integers(1, len(sentences) + 1)]) for _ in range(5)]


def real_captions():
    """Those of 100 photos."""
    file = REPO_ROOT.parent / "shared" / "real" / "flickr8k" / "val_en.json"
    if not file.is_file():
        pytest.skip("no real captions beside the repository")
    captions = defaultdict(list)
    for row in json.loads(file.read_text(encoding="utf-8"))["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return list(captions.values())[:100]


@pytest.mark.parametrize("captions", [drawn_captions, real_captions])
def test_a_hundred_captions_score_as_in_the_coco_scorer(captions):
    """A caption of each photo is left out as the answer, every third of another photo."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge
    rows = list(captions())
    answers = [rows[number - (number % 3 == 0)][0] for number in range(len(rows))]
    references = [texts[1:] for texts in rows]
    scores = scores_of(answers, references)

    truth = {number: list(map(" ".join, texts)) for number, texts in enumerate(cut_all(references))}
    found = {number: [" ".join(english_words(answer))] for number, answer in enumerate(answers)}
    ours = [scores[f"bleu_{order}"] for order in (1, 2, 3, 4)]
    assert ours == pytest.approx(bleu(4).compute_score(truth, found)[0], abs=BLEU_TOLERANCE)
    assert scores["rouge_l"] == pytest.approx(rouge().compute_score(truth, found)[0], abs=ROUGE_TOLERANCE)
    assert scores["cider_d"] == pytest.approx(cider().compute_score(truth, found)[0], abs=CIDER_TOLERANCE)


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two():
    """Five words against three, seven and nine: three is as close as seven, so there is no penalty on brevity."""
    references = [["a b c", "a b c d e f g", "a b c d e f g h i"]]
    assert scores_of(["a b c d e"], references, str.split)["bleu_1"] == pytest.approx(1, abs=1e-8)
    longer = scores_of(["a b c d e"], [references[0][1:]], str.split)["bleu_1"]
    assert longer == pytest.approx(2.718281828 ** (1 - 7 / 5), abs=1e-8)


def test_rouge_l_by_hand():
    """Common subsequences "a c d" and "a b": precision 3/4 of the first, recall 2/2 of the second."""
    precision, recall = 3 / 4, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(list("abcd"), [list("axcxd"), list("ab")]) == pytest.approx(expected, abs=1e-12)
    assert rouge_l([], [list("ab")]) == rouge_l(list("xy"), [[], ["z"]]) == 0.0


def test_cider_d_by_hand():
    """Unigram "x" stands in one of two documents, so weighs log 2; all others have no 2-grams, so 1/4 of 10 is left."""
    assert cider_d([["x"], ["z"]], [[["x"]], [["y"]]]) == pytest.approx([2.5, 0.0], abs=1e-12)
    # said three times, it counts as once, and the answer is two pairs of words longer
    clipped = 2.5 / 3 * 2.718281828 ** (-(2**2) / (2 * 6**2))
    assert cider_d([["x", "x", "x"], ["z"]], [[["x"]], [["y"]]]) == pytest.approx([clipped, 0.0], abs=1e-9)
    # what every photo's references say tells nothing
    assert cider_d([["x"], ["x"]], [[["x"]], [["x"]]]) == [0.0, 0.0]


texts = st.text(alphabet="abc  ", max_size=12)
rows = st.lists(
    st.tuples(texts, st.lists(texts, min_size=1, max_size=3), st.permutations(range(3))), min_size=1, max_size=5
)


@given(rows)
def test_scores_stay_in_range_and_ignore_the_order_of_references(rows):
    answers, references, orders = zip(*rows, strict=True)
    shuffled = [
        [given[place] for place in order if place < len(given)] for given, order in zip(references, orders, strict=True)
    ]
    scores = scores_of(answers, references, str.split)
    for name, score in scores_of(answers, shuffled, str.split).items():
        assert score == pytest.approx(scores[name], abs=1e-12)
        assert 0 <= score <= (10 if name == "cider_d" else 1) + 1e-9


sentences = st.lists(st.sampled_from("abcd"), min_size=4, max_size=8).map(" ".join)  # with n-grams of every order


@given(st.lists(st.tuples(texts, sentences), min_size=2, max_size=5))
def test_nothing_scores_above_the_reference_itself(rows):
    answers, references = zip(*rows, strict=True)
    best = scores_of(references, [[text] for text in references], str.split)
    for name, score in scores_of(answers, [[text] for text in references], str.split).items():
        assert score <= best[name] + 1e-9, name
    assert best["rouge_l"] == pytest.approx(1)


def test_the_reference_itself_scores_full_marks():
    rows = ["a dog runs on the beach", "two men climb a steep rock", "snow lies on every roof here"]
    scores = scores_of(rows, [[text] for text in rows])
    assert scores.pop("cider_d") == pytest.approx(10)
    assert scores == pytest.approx(dict.fromkeys(scores, 1), abs=1e-8)  # BLEU adds 1e-9 to the number of n-grams


def test_tallies_of_parts_add_up_to_the_corpus_score():
    """BLEU of the whole, not the mean of BLEUs; so intervals resample the corpus score itself."""
    tallies = caption_tallies(list(map(english_words, ANSWERS)), cut_all(REFERENCES))
    low, high = interval(tallies["bleu_4"], range(len(ANSWERS)))[1:]
    assert low < BLEU[3] < high
    alone = [scores_of([answer], [texts])["bleu_4"] for answer, texts in CAPTIONS]
    assert abs(sum(alone) / len(alone) - BLEU[3]) > 0.05


def test_chinese_captions_by_characters():
    references = [["一个男孩在公园里跑步。", "男孩跑步"], ["两只狗在草地上玩球"], ["女人打着伞"]]
    answers = ["一个女孩在公园里跑步", "两只狗在草地上玩球", "红色的汽车"]
    scores = scores_of(answers, references, characters)
    assert scores["bleu_1"] == pytest.approx((9 + 9) / (10 + 9 + 5), abs=1e-8)
    assert scores_of(answers, references)["bleu_1"] < 0.5  # as English, a sentence is one word


def test_corpus_scores_reward_any_reference_and_know_chinese():
    references = [["a red ball lies on the table"], ["x", "two dogs run over the wet grass"]]
    same = ["a red ball lies on the table", "two dogs run over the wet grass"]
    assert corpus_bleu(same, references) == pytest.approx(100)
    assert corpus_chrf(same, references) == pytest.approx(100)
    assert corpus_bleu(["nothing alike here at all", "no"], references) < 5
    assert corpus_bleu(["red", "two"], [["red"], ["two"]]) == pytest.approx(100)
    # one wrong character of ten: by characters some 4-grams agree, by white space there would be one wrong word
    assert corpus_bleu(["一个女孩在公园里跑步"], [["一个男孩在公园里跑步"]]) > 60


def test_corpus_bleu_cuts_english_and_chinese_together_as_each_alone():
    """Characters with spaces between them are cut alike in both languages."""
    answers = ["A dog's red ball, 3.5 m away, lies on the wet grass.", "一个女孩在公园里跑步", "Two men."]
    references = [["A dog's toy ball, 3.5 m away, lies on the grass.", "A ball."], ["一个男孩在公园里跑步"], ["Two."]]
    spaced = [" ".join(answers[1]) if place == 1 else text for place, text in enumerate(answers)]
    spaced_references = [[" ".join(texts[0])] if place == 1 else texts for place, texts in enumerate(references)]
    assert corpus_bleu(answers, references) == corpus_bleu(spaced, spaced_references)
    alone = [corpus_bleu([text], [own]) for text, own in zip(answers[:2], references[:2], strict=True)]
    assert min(alone) < corpus_bleu(answers, references) < max(alone)
