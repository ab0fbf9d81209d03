"""Scores of answers against reference answers: pure functions on strings, called by `evaluation/runner.py`.

All scores compare normalised text (`normalise`), except BLEU and chrF, which use sacrebleu's tokenisers.
Accuracies and F1 are in 0..1, BLEU and chrF in 0..100.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sacrebleu

VQA_ANNOTATORS = 10  # answers per question in VQA v2

# The ten number words and three articles of the official VQA evaluation (`manualMap`, `articles` in vqaEval.py).
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"  # Han, kana, hangul
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_SPACE_AT_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")
_WORDS = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


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


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA v2 soft accuracy: mean over annotators of min(1, agreeing others / 3).

    Source: Antol et al. 2015 (arXiv 1505.00468) and `evaluate` of vqaEval.py. Each annotator is left out once, so an
    answer of three of ten annotators scores 0.9, and an answer of four scores 1.
    """
    agreeing = [normalise(reference) == normalise(answer) for reference in references]
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


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of sacrebleu, with tokeniser `zh` if most reference text is Chinese, else `13a`.

    If all answers have fewer than four words, only the existing n-gram orders count (`effective_order`).
    """
    joined = "".join(text for texts in references for text in texts)
    chinese = 2 * len(_CJK_CHARACTER.findall(joined)) > len("".join(joined.split()))
    bleu = sacrebleu.BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    return bleu.corpus_score(answers, _streams(references)).score


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF of sacrebleu: character n-grams up to 6, no words; suitable for Chinese and English."""
    return sacrebleu.corpus_chrf(answers, _streams(references)).score


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Transpose the references to sacrebleu's form: one list per reference number, None for missing references.

    The return type has `Any`, because sacrebleu annotates the items as `str` only.
    """
    longest = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(longest)]
