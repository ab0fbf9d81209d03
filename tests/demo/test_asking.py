"""Questions about the drawn world: each has the one answer that its words and the scene give, in both languages."""

import contextlib
import re
from collections import Counter

import numpy as np
import pytest

from demo.asking import dialogue, paraphrases, questions
from demo.edits import OPENERS
from demo.paraphrases import PARAPHRASES
from demo.wordings import (
    CHINESE_PLACES,
    CHINESE_SHAPES,
    ENGLISH_PLACES,
    FORMS,
    LANGUAGES,
    SUFFIX,
    THINGS,
    WORDINGS,
)
from demo.world import CELLS, CHINESE, COLOURS, FOREIGN, SHAPES, TYPES, random_scene

NAMES = {  # word → what it means
    "english": {
        **{name: name for name in (*COLOURS, *SHAPES)},
        **{word: place for place, words in ENGLISH_PLACES.items() for word in words},
        **dict.fromkeys([*THINGS["english"], "people", "children", "buses"], FOREIGN),
    },
    "chinese": {
        **{CHINESE[name]: name for name in COLOURS},
        **{word: name for names in (CHINESE_PLACES, CHINESE_SHAPES) for name, words in names.items() for word in words},
        **dict.fromkeys(THINGS["chinese"], FOREIGN),
    },
}
PATTERNS = {
    language: re.compile("|".join(sorted(map(re.escape, words), key=len, reverse=True)))
    for language, words in NAMES.items()
}
# "一下方块" is "a bit" and "square", not "below"
PATTERNS["chinese"] = re.compile(PATTERNS["chinese"].pattern.replace("下方", "(?<!一)下方"))
PATTERNS["english"] = re.compile(rf"\b({PATTERNS['english'].pattern})(?:es|s)?\b", re.IGNORECASE)
SENTENCES = ("I only know my drawn world of coloured shapes.", "我只认识这个画出来的图形世界。")


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    return [random_scene(rng) for _ in range(200)]


def fitting(scene, names):
    """All objects of these colours, shapes and places."""
    return [thing for thing in scene if set(names) <= {thing.colour, thing.shape, thing.place}]


def the(scene, names):
    (thing,) = fitting(scene, names)  # fails unless exactly one object is meant
    return thing


def size_answer(scene, question, names, before):
    """The answer to a question for sizes; `before` is the text before the first object."""
    if len(names) < 4:
        return "large" if the(scene, names).radius > 30 else "small"
    pair = [the(scene, names[:2]), the(scene, names[2:4])]
    if re.search(r"compared|next( \w+)? to|beside|[和跟]$", before, re.IGNORECASE):  # "compared with B, is A larger?"
        pair.reverse()
    wanted = (min if re.search("smaller|小", question, re.IGNORECASE) else max)(pair, key=lambda thing: thing.radius)
    if re.search("which|what|哪|谁|还是| or the ", question, re.IGNORECASE):
        return f"{wanted.colour} {wanted.shape}"
    return "yes" if wanted is pair[0] else "no"


def true_answer(scene, kind, question):
    """The answer, found from the type and the words of the question alone."""
    language = "chinese" if kind.endswith("_zh") else "english"
    kind = kind.removesuffix("_zh")
    found = list(PATTERNS[language].finditer(question))
    words = [match[1].lower() if language == "english" else match[0] for match in found]
    names = [NAMES[language][word] for word in words]
    if kind == "unknown":
        return SENTENCES[language == "chinese"]
    if kind == "description":
        assert not names
        if language == "english":
            return "; ".join(f"{thing.place}: {thing.colour} {thing.shape}" for thing in scene) + "."
        return f"图中有{'、'.join(CHINESE[t.place] + '的' + CHINESE[t.colour] + CHINESE[t.shape] for t in scene)}。"
    if kind in ("colour", "shape"):
        answer = getattr(the(scene, names), kind)
    elif kind == "count":
        answer = str(len(fitting(scene, names)))
    elif kind == "position":
        thing = the(scene, names)
        answer = f"{thing.colour} {thing.shape}" if names[0] in CELLS else thing.place
    elif kind == "existence":
        assert names
        answer = "yes" if fitting(scene, names) else "no"
    else:
        answer = size_answer(scene, question, names, question[: found[0].start()])
    if language == "english":
        return answer
    words = CHINESE | ({"yes": "有", "no": "没有"} if kind == "existence" else {"yes": "是", "no": "否"})
    return "".join(words.get(word, word) for word in answer.split())


def test_answers_are_the_only_right_ones(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes:
        rows = questions(scene, rng, 2)
        assert {kind for kind, _, _ in rows} == {kind + end for kind in (*TYPES, "unknown") for end in ("", "_zh")}
        for kind, question, answer in rows:
            assert answer == true_answer(scene, kind, question), question


def test_sizes_are_asked_for_more_often_where_it_is_wanted(scenes):
    rng = np.random.default_rng(5)
    asked = Counter(kind for scene in scenes for kind, _, _ in questions(scene, rng, 2, sizes=4))
    assert asked["colour"] == 2 * len(scenes)
    assert asked["size"] > 3.5 * len(scenes)  # a small scene has fewer than four
    assert asked["size_zh"] > 3.5 * len(scenes)


def test_held_out_answers_are_the_only_right_ones(scenes):
    rng = np.random.default_rng(3)
    for number, scene in enumerate(scenes):
        for kind, question, answer in paraphrases(scene, rng, number):
            assert answer == true_answer(scene, kind, question), question


def test_dialogues_have_two_to_four_right_answers_in_one_or_both_languages(scenes):
    rng = np.random.default_rng(4)
    lengths, languages, kinds = set(), set(), set()
    for scene in scenes:
        rows = dialogue(scene, rng)
        lengths.add(len(rows))
        languages.add(frozenset(kind.endswith("_zh") for kind, _, _ in rows))
        kinds |= {kind for kind, _, _ in rows}
        for kind, question, answer in rows:
            assert answer == true_answer(scene, kind, question), question
    assert lengths == {2, 3, 4}
    assert languages == {frozenset({True}), frozenset({False}), frozenset({True, False})}
    assert kinds == {kind + end for kind in (*TYPES, "unknown") for end in ("", "_zh")}


def test_a_wrong_answer_would_be_seen(scenes):
    """The brute force above is no echo: of two scenes' answers to the same question, most differ."""
    rng = np.random.default_rng(5)
    same = total = 0
    for scene, other in zip(scenes[:60], scenes[60:120], strict=True):
        for kind, question, answer in questions(scene, rng):
            if not kind.startswith("unknown"):
                with contextlib.suppress(ValueError):  # not one such object there
                    same += true_answer(other, kind, question) == answer
                total += 1
    assert same < 0.4 * total


def test_without_places(scenes):
    for scene in scenes[:50]:
        for kind, question, answer in questions(scene, np.random.default_rng(6), 2, places=False):
            language = "chinese" if kind.endswith("_zh") else "english"
            words = [match.group().lower() for match in PATTERNS[language].finditer(f"{question} {answer}")]
            assert not kind.startswith(("position", "description"))
            assert not {NAMES[language].get(word) for word in words} & set(CELLS), question


def plain(text):
    """What is left of a question without case, punctuation, spaces and contractions."""
    text = text.lower().replace("what's", "what is").replace("where's", "where is").replace("color", "colour")
    return re.sub(r"[^\w{}]", "", text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_ten_paraphrases_a_type_that_are_no_wording(language):
    known = {plain(text) for texts in WORDINGS[language].values() for text in texts}
    openers = ["", *map(plain, OPENERS[language])]
    assert set(WORDINGS[language]) == set(PARAPHRASES[language]) == {form for forms in FORMS.values() for form in forms}
    for forms in FORMS.values():
        held_out = [text for form in dict.fromkeys(forms) for text in PARAPHRASES[language][form]]
        assert len({plain(text) for text in held_out}) == len(held_out) == 10
        for text in held_out:
            assert not {plain(text).removeprefix(opener) for opener in openers} & known, text


def test_all_held_out_wordings_are_asked(scenes):
    """Ten photos show every one of them."""
    asked = {kind: set() for kind in (kind + end for kind in FORMS for end in SUFFIX.values())}
    for number in range(10):
        for kind, question, _ in paraphrases(scenes[0], np.random.default_rng(7), number):
            asked[kind].add(question)
    assert {kind: len(texts) for kind, texts in asked.items()} == dict.fromkeys(asked, 10)


def test_guessing_scores_low(scenes):
    rng = np.random.default_rng(8)
    answers = {kind + end: Counter() for kind in TYPES for end in SUFFIX.values()}
    for scene in [scene for scene in scenes for _ in range(4)]:  # 1,600 a type: shares vary by 0.01
        for kind, _, answer in questions(scene, rng, 2):
            if not kind.startswith("unknown"):
                answers[kind][answer] += 1
    limits = {"colour": 0.27, "shape": 0.37, "count": 0.34, "position": 0.2, "existence": 0.57, "size": 0.4}
    for kind, counts in answers.items():
        limit = (limits | {"description": 0.02})[kind.removesuffix("_zh")]
        assert max(counts.values()) / counts.total() < limit, kind
