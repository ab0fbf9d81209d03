"""Shared-image packing: several questions on one photo in one sequence.

    [prefix + photo][question 1 + answer 1][question 2 + answer 2] …

Every branch sees the prefix and itself, and its positions continue where the prefix ends, so loss and gradients equal
those of the separate samples while the photo's tokens pass the language model once (`qwen/attention.py` sees to that).
Used by `dataset/image_caption_dataset.py`.
"""

from qwen.chat import IGNORE_INDEX


def pack(
    samples: list[tuple[list[int], list[int]]], prefix_length: int
) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Lay samples with a common prefix out as one sequence.

    Args:
        samples: (input_ids, labels) of each question; the first `prefix_length` ids are the same in all.
        prefix_length: up to and including the last photo token.

    Returns:
        `input_ids` and `labels` (T,), and the lengths of the prefix and of each branch.
    """
    prefix = samples[0][0][:prefix_length]
    input_ids, labels, lengths = list(prefix), samples[0][1][:prefix_length], [prefix_length]
    for sample_ids, sample_labels in samples:
        assert sample_ids[:prefix_length] == prefix, "packed samples must share their prefix"
        # the token before a branch in the sequence is not its predecessor, so it must not be asked to predict it
        assert sample_labels[prefix_length] == IGNORE_INDEX, "the first token of a branch cannot be supervised"
        input_ids += sample_ids[prefix_length:]
        labels += sample_labels[prefix_length:]
        lengths.append(len(sample_ids) - prefix_length)
    return input_ids, labels, tuple(lengths)
