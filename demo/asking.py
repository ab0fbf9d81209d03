"""Questions about the drawn world in English and Chinese, as people type them, each with exactly one correct answer.

Called by `demo/make_data.py` and `demo/language.py`, so that training and pretraining ask in the same ways.
"""

import numpy as np

from demo.edits import FirstChoice, Words, pick, vary
from demo.paraphrases import PARAPHRASES
from demo.wordings import (
    CHINESE_OBJECTS,
    CHINESE_PLACES,
    CHINESE_SHAPES,
    ENGLISH_OBJECTS,
    ENGLISH_PLACES,
    FILLS,
    FORMS,
    IMAGE_WORDS,
    LANGUAGES,
    MORE,
    SUFFIX,
    THINGS,
    UNKNOWN,
    WORDINGS,
)
from demo.world import CELLS, CHINESE, FOREIGN, SHAPES, TYPES, Fact, Names, Scene, captions, description, fact

Row = tuple[str, str, str]  # type, question, answer
LONG_SHARE = 0.1  # share of descriptions, and of questions without an answer, in dialogues
UNKNOWN_FACT = Fact("unknown", (), ())


def questions(
    scene: Scene, rng: np.random.Generator, per_type: int = 1, places: bool = True, plain: bool = False, sizes: int = 0
) -> list[Row]:
    """Return `per_type` questions of each type and language, one of them a description, one without an answer.

    No question asks for the same as another of its language. A small scene may give fewer than `per_type`.

    Args:
        places: False leaves out what names a place.
        plain: ask in the first wording of each form only, about things that are there, in one way where something is,
            and in one way what is larger: whether the first thing is.
        sizes: questions about sizes of each language; 0: `per_type`.
    """
    words = FirstChoice() if plain else rng
    rows = []
    for kind in FORMS:
        for language in LANGUAGES:
            number = {"description": 1, "unknown": 1, "size": sizes or per_type}.get(kind, per_type)
            found: dict[tuple, Fact] = {}
            for turn in range(number * 4):  # extra tries, because a small scene may give the same fact again
                one = _fact(scene, rng, kind, turn)
                if (places or not _names_place(one)) and not (plain and _asks_otherwise(one)):
                    found.setdefault((one.form, one.subjects, one.more), one)
                if len(found) == number:
                    break
            rows += [(kind + SUFFIX[language], *_worded(one, scene, words, language)) for one in found.values()]
    return rows


def dialogue(scene: Scene, rng: np.random.Generator) -> list[Row]:
    """Return the 2 to 4 turns of a dialogue in one or both languages; no question is asked twice."""
    number = int(rng.integers(2, 5))
    language, mixed = str(rng.choice(LANGUAGES)), rng.random() < 0.4
    rows: list[Row] = []
    asked: set[Fact] = set()
    while len(rows) < number:
        kind = str(rng.choice(["description", "unknown"])) if rng.random() < LONG_SHARE else str(rng.choice(TYPES[:-1]))
        one = _fact(scene, rng, kind, len(rows))
        if one not in asked:
            asked.add(one)
            language = str(rng.choice(LANGUAGES)) if mixed else language
            rows.append((kind + SUFFIX[language], *_worded(one, scene, rng, language)))
    return rows


def paraphrases(scene: Scene, rng: np.random.Generator, number: int) -> list[Row]:
    """Return the held-out question `number` modulo 10 of each type and language."""
    rows = []
    for kind, forms in FORMS.items():
        for language in LANGUAGES:
            held_out = [(form, text) for form in dict.fromkeys(forms) for text in PARAPHRASES[language][form]]
            form, wording = held_out[number % len(held_out)]
            one = UNKNOWN_FACT if form == "unknown" else fact(scene, rng, form, int(rng.integers(2)))
            rows.append((kind + SUFFIX[language], fill(wording, one, rng, language), answer(one, scene, language)))
    return rows


def _fact(scene: Scene, rng: np.random.Generator, kind: str, turn: int) -> Fact:
    return UNKNOWN_FACT if kind == "unknown" else fact(scene, rng, pick(FORMS[kind], rng), turn)


def _worded(one: Fact, scene: Scene, rng: Words, language: str) -> tuple[str, str]:
    text = fill(pick(WORDINGS[language][one.form], rng), one, rng, language)
    return vary(text, rng, language), answer(one, scene, language)


def _names_place(one: Fact) -> bool:
    names = {name for subject in one.subjects for name in subject} | set(one.answer)
    return one.form == "description" or not names.isdisjoint(CELLS)


def _asks_otherwise(one: Fact) -> bool:
    return one.form in ("at", "which", "size") or one.more == "small" or (FOREIGN,) in one.subjects


def answer(one: Fact, scene: Scene, language: str) -> str:
    """Return the answer in the words of `language`."""
    if one.form == "unknown":
        return UNKNOWN[language]
    if one.form == "description":
        return description(scene) if language == "english" else captions(scene)[0]
    if language == "english":
        return " ".join(one.answer)
    yes_no = {"yes": "有", "no": "没有"} if one.form == "existence" else {"yes": "是", "no": "否"}
    return "".join(yes_no.get(name, CHINESE.get(name, name)) for name in one.answer)


def fill(wording: str, one: Fact, rng: Words, language: str) -> str:
    """Fill the slots of a wording with words for the fact; an English question begins with a capital if it did."""
    noun = _english_noun if language == "english" else _chinese_noun
    things = FILLS[language] | {"thing": THINGS[language], "image": IMAGE_WORDS[language]}
    slots = {slot: pick(options, rng) for slot, options in things.items()}
    if one.form == "at":
        ((place,),) = one.subjects
        nouns = [pick((ENGLISH_PLACES if language == "english" else CHINESE_PLACES)[place], rng)]
    else:
        nouns = [noun(names, rng, plural=False) for names in one.subjects]
    plural = noun(one.subjects[0], rng, plural=True) if one.form in ("count", "existence") else ""
    more = pick(MORE[language][one.more], rng) if one.more else ""
    text = wording.format(*nouns, s=plural, more=more, **slots)
    return text[0].upper() + text[1:] if wording[0] == "{" else text


def _english_noun(names: Names, rng: Words, plural: bool) -> str:
    if names == (FOREIGN,):
        noun = pick(THINGS["english"], rng)
        many = {"person": "people", "child": "children", "fish": "fish", "bus": "buses"}.get(noun, f"{noun}s")
        return many if plural else noun
    end = "s" if plural else ""
    if names and names[-1] in SHAPES:
        return " ".join(names) + ("es" if plural and names[-1] == "cross" else end)
    if not names:
        return pick(ENGLISH_OBJECTS[:-1], rng) + end
    if names[0] in CELLS:
        return f"{pick(ENGLISH_OBJECTS, rng)}{end} in the {pick(ENGLISH_PLACES[names[0]], rng)}"
    return f"{names[0]} {pick(ENGLISH_OBJECTS, rng)}{end}"


def _chinese_noun(names: Names, rng: Words, plural: bool) -> str:
    if names == (FOREIGN,):
        return pick(THINGS["chinese"], rng)
    shape = pick(CHINESE_SHAPES[names[-1]], rng) if names and names[-1] in SHAPES else ""
    if shape:
        joint = "的" if len(names) > 1 and rng.random() < 0.4 else ""
        return "".join(CHINESE[name] for name in names[:-1]) + joint + shape
    noun = pick(CHINESE_OBJECTS[: -1 if plural or not names else None], rng)
    if not names:
        return noun
    if names[0] in CELLS:
        return f"{pick(CHINESE_PLACES[names[0]], rng)}的{noun}"
    return CHINESE[names[0]] + ("的" if noun == "那个" or rng.random() < 0.5 else "") + noun
