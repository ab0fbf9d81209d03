"""How a text is cut into the words that `evaluation/captions.py` counts: English words, Chinese characters, jieba.

The COCO caption scorer cuts English with the Penn Treebank tokeniser of Stanford CoreNLP, which needs Java, and drops
punctuation. `english_words` follows its rules. Known differences: "at&t" and "'n'" are cut otherwise, and brackets
keep their form, which the scorer calls `-lrb-` and `-rrb-`.
"""

import functools
import importlib
import importlib.util
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

Cut = Callable[[str], list[str]]  # text → words

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af"  # Han, kana, hangul
_CJK_CHARACTER = re.compile(f"[{CJK}]")
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TWO_WORDS = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))")
_ENGLISH_WORD = re.compile(
    r"""n't(?!\w) | '(?:s|m|d|re|ve|ll)(?!\w)      # don't → do n't, man's → man 's
    | (?:[^\W\d_]\.){2,}                            # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.            # abbreviations keep their point
    | \w+(?:(?:[-/&'.:_]|(?<=\d),(?=\d))\w+)*       # t-shirt, black/white, r&b, o'clock, 3.5, 2,000
    | [^\s\w.,:;?!'"`‘’“”…–—-]                      # & and %; brackets too, as in the COCO scorer
    """,
    re.VERBOSE,
)


def english_words(text: str) -> list[str]:
    """Cut a text into lower-case words without punctuation, as the COCO caption scorer does."""
    text = _CLITIC.sub(r" \1", text.lower().replace("’", "'"))
    return _ENGLISH_WORD.findall(_TWO_WORDS.sub(r"\1 ", text))


def characters(text: str) -> list[str]:
    """Cut a Chinese text into characters without punctuation; words and numbers in Latin script stay whole."""
    words = english_words(_CJK_CHARACTER.sub(r" \g<0> ", unicodedata.normalize("NFKC", text)))
    return _without_punctuation(words)


def jieba_words(text: str) -> list[str]:
    """Cut a Chinese text into jieba's words, without punctuation.

    Raises:
        ImportError: jieba is not installed.
    """
    return _without_punctuation(_jieba().lcut(unicodedata.normalize("NFKC", text).lower()))


def _without_punctuation(words: list[str]) -> list[str]:
    return [word for word in words if any(character.isalnum() for character in word)]


@functools.cache
def _jieba() -> ModuleType:
    jieba = importlib.import_module("jieba")
    jieba.setLogLevel(logging.WARNING)  # else it writes to stderr that it loads its dictionary
    return jieba


def mostly_chinese(texts: Iterable[str]) -> bool:
    """Tell whether at least half of the words are single Chinese characters (or kana or hangul): "T恤" is Chinese."""
    words = _WORD.findall(" ".join(texts))
    chinese = sum(_CJK_CHARACTER.match(word) is not None for word in words)
    return 0 < len(words) <= 2 * chinese


def cuts(references: Sequence[Sequence[str]]) -> dict[str, list[Cut]]:
    """Name of a way to cut texts → the cut of each answer, which is that of the language of its own references.

    English is always cut into words. Chinese is cut into characters and, with the optional package jieba, also into
    its words: if one answer is Chinese, the ways are called `characters` and `jieba`, else `words`.

    Args:
        references: one or more texts per answer.
    """
    chinese = list(map(mostly_chinese, references))
    if not any(chinese):
        return {"words": [english_words] * len(references)}
    found: dict[str, Cut] = {"characters": characters}
    if importlib.util.find_spec("jieba"):
        found["jieba"] = jieba_words
    return {name: [cut if own else english_words for own in chinese] for name, cut in found.items()}
