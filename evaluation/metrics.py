"""Scores of short answers against reference answers: pure functions on strings, called by `evaluation/runner.py`.

All scores are in 0..1. They compare normalised text: `vqa_accuracy` by the official rules of VQA v2
(`vqa_normalise`), ANLS by its own, all others by `normalise`, which knows Unicode and Chinese too.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from evaluation.words import CJK

VQA_ANNOTATORS = 10  # answers per question in VQA v2

# The ten number words and three articles of the official VQA evaluation (`manualMap`, `articles` in vqaEval.py).
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # `punct` there; apostrophe, colon, %, & and $ are not in it

# Words whose missing apostrophe the official evaluation puts in, by ending.
_CONTRACTED = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "'ow's'at 'twas ma'am o'clock y'all",
}
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for ending, stems in _CONTRACTED.items()
    for word in (stem + ending for stem in stems.split())
    for place, character in enumerate(word)
    if character == "'"
}

_SPACE_AT_CJK = re.compile(rf"(?<=[{CJK}])\s+|\s+(?=[{CJK}])")
_WORDS = re.compile(rf"[{CJK}]|[^\s{CJK}]+")


def normalise(text: str) -> str:
    """Normalise an answer for comparison.

    * Full-width forms become half-width (NFKC); letters become lower case.
    * Apostrophes and commas between digits are removed. Other punctuation, also Chinese, becomes a space, except `%`
      and a point between digits.
    * English articles are removed and number words up to ten become digits, as in the official VQA evaluation
      (GT-Vision-Lab/VQA, vqaEval.py).
    * Spaces beside Chinese characters are removed; other spaces become single.

    Chinese numerals do not change.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"['’`]|(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    text = "".join(" " if _is_separator(character) else character for character in text)
    words = text.split()
    words = [word for word in words if word not in _ARTICLES] or words  # the answer may be only the letter "A"
    words = [_DIGITS.get(word, word) for word in words]
    return _SPACE_AT_CJK.sub("", " ".join(words))


def _is_separator(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in "%."


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1.0 if the answer equals any reference after normalisation, else 0.0."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def vqa_normalise(text: str) -> str:
    """Normalise an answer by the official rules of VQA v2 (GT-Vision-Lab/VQA, vqaEval.py).

    * A punctuation mark with a space beside it anywhere in the text is removed wherever it stands, else it becomes a
      space. If a comma stands between digits, all punctuation is removed. Apostrophes stay, points stay before digits.
    * Letters become lower case, number words up to ten (and "none") digits; articles are removed.
    * A word that lacks one apostrophe of a contraction gets it ("dont", "he'dve").

    Not covered: the official table takes the apostrophe out of "somebody'd", and leaves points from the 33rd on.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    thousands = re.search(r"\d,\d", text)
    removed = [mark for mark in _PUNCTUATION if thousands or f"{mark} " in text or f" {mark}" in text]
    text = text.translate({ord(mark): "" if mark in removed else " " for mark in _PUNCTUATION})
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA v2 soft accuracy: mean over annotators of min(1, agreeing others / 3).

    Source: Antol et al. 2015 (arXiv 1505.00468) and `evaluate` of vqaEval.py. Each annotator is left out once, so an
    answer of three of ten annotators scores 0.9, and an answer of four scores 1. As there, texts are normalised only if
    the annotators disagree: where all wrote "yes", the answer "Yes" scores 0. References with Chinese, for which there
    are no official rules, are always compared with `normalise`.
    """
    answer, *references = [re.sub(r"[\n\t]", " ", text).strip() for text in [answer, *references]]
    if re.search(f"[{CJK}]", "".join(references)):
        answer, *references = map(normalise, [answer, *references])
    elif len(set(references)) > 1:
        answer, *references = map(vqa_normalise, [answer, *references])
    agreeing = [reference == answer for reference in references]
    return sum(min(1.0, (sum(agreeing) - agrees) / 3) for agrees in agreeing) / len(references)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA soft accuracy for ten or more references, else exact match with any reference.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("a question without reference answers cannot be scored: give it at least one answer")
    return vqa_accuracy(answer, references) if len(references) >= VQA_ANNOTATORS else exact_match(answer, references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of shared words over the references (SQuAD, arXiv 1606.05250); each Chinese character is a word."""
    return max(_f1(_WORDS.findall(normalise(answer)), _WORDS.findall(normalise(reference))) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def anls(answer: str, references: Sequence[str]) -> float:
    """ANLS of one answer: best 1 − edit distance / longer length over the references, and 0 where that is ≤ 0.5.

    Source: Biten et al. 2019 (arXiv 1905.13648), threshold 0.5. Upper and lower case are the same, and white space
    counts as single spaces; punctuation and articles count.
    """
    answer, *references = [" ".join(text.lower().split()) for text in [answer, *references]]
    similarities = [
        1 - _edit_distance(answer, reference) / max(len(answer), len(reference), 1) for reference in references
    ]
    return max((similarity for similarity in similarities if similarity > 0.5), default=0.0)


def _edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: fewest characters to insert, delete or replace."""
    distances = list(range(len(second) + 1))  # from the characters of `first` so far to the first 0, 1, … of `second`
    for row, character in enumerate(first, start=1):
        above, distances = distances, [row]
        for column, other in enumerate(second):
            replaced = above[column] + (character != other)
            distances.append(min(replaced, above[column + 1] + 1, distances[column] + 1))
    return distances[-1]


def daquar_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of DAQUAR: 1.0 if the answer names the things of any reference and no others, in any order, else 0.0.

    Source: Malinowski and Fritz 2014 (arXiv 1410.0210). Its answers are lists with commas ("book, night_stand").
    """
    return float(things(answer) in map(things, references))


def things(text: str) -> set[str]:
    return {normalise(thing) for thing in text.split(",")} - {""}
