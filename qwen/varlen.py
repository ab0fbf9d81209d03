"""Attention over a packed row by FlashAttention's kernel for sequences of different lengths, on GPUs that have it.

`attention.py` computes a sample at a time. On a GPU that is many small kernels, and the mask of the branches hides most
of what is computed. Here each branch is a sequence whose keys are those of its prefix and its own:

    queries: the packed row, unchanged      [prefix][branch 1][branch 2]
    keys:    gathered for this call         [prefix][prefix][branch 1][prefix][branch 2]

The last token of a sequence of queries sees all its keys, the one before it all but one, and so on. For the backward
pass, the keys are gathered again, so each is kept once.

Shapes: T tokens of the row, K gathered keys, S sequences, H and G query and key heads, D head width.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

import compat
from batch import Lengths

# Keys of a call; at least a sample. With 28 heads of 128, its copies take 0.5 GB for a moment.
MOST_KEYS = 32768


@dataclass(frozen=True)
class Sequences:
    """Some samples of a row as sequences for one call.

    Attributes:
        start, end: their tokens in the row.
        keys: (K,) places in the row of the keys; None: those of the tokens, once.
        ends: of the sequences.
    """

    start: int
    end: int
    keys: torch.Tensor | None
    ends: compat.SequenceEnds


def split_row(lengths: Lengths, device: torch.device) -> list[Sequences]:
    """Divide a packed row into calls of at most `MOST_KEYS` keys, or one sample."""
    calls: list[list[tuple[int, ...]]] = [[]]
    total = 0
    for sample in lengths:
        keys = sample[0] * len(sample) + sum(sample[1:])
        if calls[-1] and total + keys > MOST_KEYS:
            calls.append([])
            total = 0
        calls[-1].append(sample)
        total += keys
    start, found = 0, []
    for samples in calls:
        found.append(_sequences(samples, start, device))
        start = found[-1].end
    return found


def _sequences(samples: list[tuple[int, ...]], start: int, device: torch.device) -> Sequences:
    queries, keys, places = [], [], []
    place = start
    for prefix, *branches in samples:
        shared = torch.arange(place, place + prefix)
        if prefix:
            queries.append(prefix)
            keys.append(prefix)
            places.append(shared)
        place += prefix
        for branch in branches:
            queries.append(branch)
            keys.append(prefix + branch)
            places += [shared, torch.arange(place, place + branch)]
            place += branch
    once = all(len(sample) == 1 for sample in samples)

    def ends(own: list[int]) -> torch.Tensor:
        return torch.tensor([0, *own]).cumsum(0).to(torch.int32).to(device)

    gathered = None if once else torch.cat(places).to(device)
    return Sequences(start, place, gathered, compat.SequenceEnds(ends(queries), ends(keys), max(queries), max(keys)))


class _VarlenAttention(torch.autograd.Function):
    """Attention of all calls; keeps the queries, keys, values and output of the row."""

    @staticmethod
    def forward(ctx, query, key, value, calls, window, scale):
        """(T, H, D), (T, G, D) twice → (T, H, D)."""
        parts, kept = [], []
        for call in calls:
            part, *state = compat.flash_forward(
                query[call.start : call.end], _gather(key, call), _gather(value, call), call.ends, window, scale
            )
            parts.append(part)
            kept += state
        output = _joined(parts)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.calls, ctx.window, ctx.scale = calls, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, *kept = ctx.saved_tensors
        query_gradients = []
        # a prefix has a part of its gradient from each branch; the sum would lose digits in bf16
        sums = [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in (key, value)]
        states = len(kept) // len(ctx.calls)
        for number, call in enumerate(ctx.calls):
            own = slice(call.start, call.end)
            query_gradient, *found = compat.flash_backward(
                gradient[own], query[own], _gather(key, call), _gather(value, call), output[own],
                kept[number * states : (number + 1) * states], call.ends, ctx.window, ctx.scale,
            )  # fmt: skip
            query_gradients.append(query_gradient)
            for total, part in zip(sums, found, strict=True):
                if call.keys is None:
                    total[own] = part
                else:
                    total.index_add_(0, call.keys, part.to(total.dtype))
        key_gradient, value_gradient = (total.to(key.dtype) for total in sums)
        return _joined(query_gradients), key_gradient, value_gradient, None, None, None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(tensor: torch.Tensor, call: Sequences) -> torch.Tensor:
    return tensor[call.start : call.end] if call.keys is None else tensor[call.keys]


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: list[Sequences],
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention over a packed row.

    Args:
        query: (1, H, T, D); key and value (1, G, T, D), H a multiple of G.
        calls: of `split_row`.
        window: number of positions that a token attends to, itself included; None: all.
        scale: factor of the scores; None: D ** -0.5.

    Returns:
        (1, T, H, D).
    """
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _VarlenAttention.apply(*rows, calls, window, scale).unsqueeze(0)
