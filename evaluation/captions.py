"""Scores of sentences against several reference sentences: BLEU, ROUGE-L, CIDEr-D and chrF.

BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D are those of the COCO caption scorer (github.com/tylin/coco-caption): the same
numbers for the same words (`evaluation/words.py`). METEOR and SPICE are not computed: METEOR is defined by a Java
program, whose numbers other implementations do not give, and SPICE needs Java.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import sacrebleu

from evaluation.intervals import Tally, mean_tally
from evaluation.words import mostly_chinese

ORDERS = 4  # n-grams of 1 to 4 words, in BLEU and in CIDEr-D
_BETA = 1.2  # ROUGE-L: weight of recall against precision
_SIGMA = 6.0  # CIDEr-D: words by which lengths may differ (Vedantam et al. 2015)
_NO_MATCH, _NO_NGRAM = 1e-15, 1e-9  # BLEU: added to matches and to n-grams, so that neither is 0

Ngram = tuple[str, ...]
Words = Sequence[str]


def caption_scores(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and ROUGE-L in 0..1, CIDEr-D in 0..10, of all answers together; see `caption_tallies`."""
    return {name: tally.score for name, tally in caption_tallies(answers, references).items()}


def caption_tallies(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Tally]:
    """Score name → statistics per answer, from which `evaluation/intervals.py` makes scores and intervals.

    CIDEr-D counts document frequencies in the given references, one document per answer, so it is a number about this
    set of photos: of a single photo it is 0, and a part of the set has other frequencies. Resamples keep the
    frequencies of the whole set.

    Args:
        answers: one text per question, cut into words (`evaluation.words.cuts`).
        references: one or more texts per question, cut likewise; their order does not matter.
    """
    bleu = np.array(list(map(_bleu_row, answers, references)), dtype=np.float64)  # (answers, 9)
    return {
        **{f"bleu_{order}": Tally(bleu, functools.partial(_bleu, order=order)) for order in range(1, ORDERS + 1)},
        "rouge_l": mean_tally(list(map(rouge_l, answers, references))),
        "cider_d": mean_tally(cider_d(answers, references)),
    }


def _ngrams(words: Words) -> Counter[Ngram]:
    """Count the n-grams of all four orders."""
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _bleu_row(words: Words, references: Sequence[Words]) -> list[int]:
    """Matching n-grams by order, n-grams by order, and the reference length closest to the answer's (or the shorter).

    An n-gram matches as often as it stands in the one reference that has it most often.
    """
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    matches = [0] * ORDERS
    for ngram, times in (_ngrams(words) & most).items():
        matches[len(ngram) - 1] += times
    ngrams = [max(0, len(words) - order + 1) for order in range(1, ORDERS + 1)]
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*matches, *ngrams, closest]


def _bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU up to `order` in 0..1 of summed rows (…, 9): geometric mean of the precisions and brevity penalty."""
    matches, ngrams = sums[..., :order], sums[..., ORDERS : ORDERS + order]
    precisions = (matches + _NO_MATCH) / (ngrams + _NO_NGRAM)
    ratio = (ngrams[..., 0] + _NO_MATCH) / (sums[..., -1] + _NO_NGRAM)  # answer length / reference length
    return np.prod(precisions, axis=-1) ** (1 / order) * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """ROUGE-L of one answer: F of the best precision and the best recall, which may come from two references."""
    common = [_longest_common_subsequence(words, reference) for reference in references]
    if not max(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest sequence of words that both have in this order, with gaps allowed."""
    lengths = [0] * (len(second) + 1)  # of the words of `first` so far and the first 0, 1, … words of `second`
    for word in first:
        above, lengths = lengths, [0]
        for position, other in enumerate(second):
            longest = above[position] + 1 if word == other else max(above[position + 1], lengths[position])
            lengths.append(longest)
    return lengths[-1]


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each answer, in 0..10: clipped similarity of tf-idf vectors with a penalty on length.

    Source: Vedantam et al. 2015 (arXiv 1411.5726).
    """
    counted = [[_ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in counted for ngram in set().union(*texts))
    all_documents = math.log(len(references))
    rarity = {ngram: all_documents - math.log(number) for ngram, number in documents.items()}

    def vector(counts: Counter[Ngram]) -> tuple[dict[Ngram, float], list[float], int]:
        """Weights of the n-grams, norm by order, and length in pairs of words, as in the COCO scorer."""
        weights = {ngram: times * rarity.get(ngram, all_documents) for ngram, times in counts.items()}
        squares = [0.0] * ORDERS
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        pairs = sum(times for ngram, times in counts.items() if len(ngram) == 2)
        return weights, list(map(math.sqrt, squares)), pairs

    scores = []
    for words, texts in zip(answers, counted, strict=True):
        answer = vector(_ngrams(words))
        scores.append(10 * sum(_similarity(answer, vector(text)) for text in texts) / len(texts))
    return scores


def _similarity(
    answer: tuple[dict[Ngram, float], list[float], int], reference: tuple[dict[Ngram, float], list[float], int]
) -> float:
    """Mean over the orders of the clipped cosine of two vectors, times the penalty on their difference in length."""
    (weights, norms, length), (others, other_norms, other_length) = answer, reference
    products = [0.0] * ORDERS
    for ngram, weight in weights.items():
        other = others.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    norm_products = [norm * other for norm, other in zip(norms, other_norms, strict=True)]
    cosines = sum(product / both for product, both in zip(products, norm_products, strict=True) if both)
    return cosines / ORDERS * math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of sacrebleu in 0..100, with tokeniser `zh` if any answer is to be Chinese, else `13a`.

    `zh` sets Chinese characters apart and cuts the rest as `13a` does, so it suits English answers among Chinese ones.

    Unlike `bleu_4` of `caption_scores` it counts capitals and punctuation, and smooths. If all answers have fewer than
    four words, only the existing n-gram orders count (`effective_order`).
    """
    chinese = any(map(mostly_chinese, references))
    bleu = sacrebleu.BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    return bleu.corpus_score(answers, _streams(references)).score


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF of sacrebleu in 0..100: character n-grams up to 6, no words; suitable for Chinese and English."""
    return sacrebleu.corpus_chrf(answers, _streams(references)).score


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Transpose the references to sacrebleu's form: one list per reference number, None for missing references.

    The return type has `Any`, because sacrebleu annotates the items as `str` only.
    """
    longest = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(longest)]
