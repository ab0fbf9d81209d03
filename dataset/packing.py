"""Shared-image packing: several questions on one photo in one sequence.

    [prefix + photo][question 1 + answer 1][question 2 + answer 2] …

Every branch sees the prefix and itself, and its positions go on where the prefix ends, so loss and gradients equal
those of the separate samples while the photo's tokens pass the language model once. Used by
`dataset/image_caption_dataset.py`.

Shapes: B batch, T tokens.
"""

import torch

from qwen.chat import IGNORE_INDEX

PADDING = -1  # branch number of padding; 0 is the prefix


def pack(samples: list[tuple[list[int], list[int]]], prefix_length: int) -> dict[str, torch.Tensor]:
    """Lay samples with a common prefix out as one sequence.

    Args:
        samples: (input_ids, labels) of each question; the first `prefix_length` ids are the same in all.
        prefix_length: up to and including the last photo token.

    Returns:
        `input_ids`, `labels`, `position_ids` and `branch` (0 the prefix, 1, 2, … the questions), each (T,) int64.
    """
    prefix, prefix_labels = samples[0][0][:prefix_length], samples[0][1][:prefix_length]
    input_ids, labels = list(prefix), list(prefix_labels)
    position_ids, branch = list(range(prefix_length)), [0] * prefix_length
    for number, (sample_ids, sample_labels) in enumerate(samples, start=1):
        assert sample_ids[:prefix_length] == prefix, "packed samples must share their prefix"
        # the token before a branch in the sequence is not its predecessor, so it must not be asked to predict it
        assert sample_labels[prefix_length] == IGNORE_INDEX, "the first token of a branch cannot be supervised"
        input_ids += sample_ids[prefix_length:]
        labels += sample_labels[prefix_length:]
        position_ids += range(prefix_length, len(sample_ids))
        branch += [number] * (len(sample_ids) - prefix_length)
    columns = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "branch": branch}
    return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}


def branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """Who may look at whom in packed sequences.

    Args:
        branch: (B, T); -1 is padding.

    Returns:
        (B, 1, T, T) bool, True where the row's token sees the column's: itself, and earlier ones of the prefix or of
        its own branch. Padding sees itself, since a row without any True has no softmax.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    row, column = branch[:, :, None], branch[:, None, :]
    visible = ((column == 0) | (row == column)) & (row != PADDING) & causal  # (B, T, T)
    visible |= torch.eye(length, dtype=torch.bool, device=branch.device)
    return visible.unsqueeze(1)
