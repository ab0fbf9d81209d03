"""Attention over samples that lie behind one another in a single row, each with branches that share its prefix.

    row 0:  [prefix of sample 1][branch][branch] … [prefix of sample 2][branch] … [sample without branches] …

A token sees the earlier ones of its prefix and of its own branch, and nothing of other samples. `collate` describes a
row with a `PackedLayout`; `Mqwen.py` turns it into the mask objects that transformers hands through to every layer; the
function registered here computes what the description says. Ordinary masks (answering, generation) go on to
transformers' own `sdpa`.

Shapes: B batch, H and G query and key heads, T tokens of the row, L of one sample, D head width.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "shared_prefix"  # the name transformers knows it by


@dataclass(frozen=True)
class PackedLayout:
    """What stands where in a row.

    Attributes:
        samples: for each sample the length of its prefix, then those of its branches, in tokens; a sample with one
            question is a prefix alone.
    """

    samples: tuple[tuple[int, ...], ...]

    def positions(self) -> torch.Tensor:
        """(1, T) int64: from 0 in every sample; each branch goes on where the prefix ends."""
        return torch.cat([_positions(lengths) for lengths in self.samples]).unsqueeze(0)


def _positions(lengths: tuple[int, ...]) -> torch.Tensor:
    prefix, *branches = lengths
    return torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in branches)])


def _branch_numbers(lengths: tuple[int, ...]) -> torch.Tensor:
    """(L,) 0 for the prefix, 1, 2, … for the branches."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@dataclass
class PackedMask:
    """A `PackedLayout` as the attention of one kind of layers sees it; stands in place of a mask tensor.

    Attributes:
        window: a token sees so many positions back, itself included; None: all.
    """

    layout: PackedLayout
    window: int | None
    _dense: dict[tuple, torch.Tensor] = field(default_factory=dict)  # one set for all layers of a step

    def dense(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Scores to add within sample `number`, 0 or -inf, of dtype and device of `like`: (L - prefix, L) for the
        rows of its branches, or (L, L) where there is a window."""
        key = (number, like.dtype, like.device)
        if key not in self._dense:
            lengths = self.layout.samples[number]
            position, branch = _positions(lengths), _branch_numbers(lengths)
            first = lengths[0] if self.window is None else 0
            distance = position[first:, None] - position[None, :]
            visible = (distance >= 0) & ((branch[None, :] == 0) | (branch[first:, None] == branch[None, :]))
            if self.window is not None:
                visible &= distance < self.window
            scores = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, -torch.inf)
            self._dense[key] = scores.to(like.device)
        return self._dense[key]


def flex_mask(layout: PackedLayout, window: int | None, device: torch.device) -> BlockMask:
    """The same as a `PackedMask`, for FlexAttention: blocks of 128 × 128 in which nobody sees anybody are left out."""
    position = layout.positions()[0].to(device)
    branch = torch.cat([_branch_numbers(lengths) for lengths in layout.samples]).to(device)
    sizes = torch.tensor([sum(lengths) for lengths in layout.samples])
    sample = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)

    def visible(batch, head, row, column):
        distance = position[row] - position[column]
        seen = (sample[row] == sample[column]) & (distance >= 0)
        seen = seen & ((branch[column] == 0) | (branch[row] == branch[column]))
        return seen if window is None else seen & (distance < window)

    return create_block_mask(visible, None, None, len(position), len(position), device=device)


@functools.cache
def _compiled_flex_attention():
    # outside of torch.compile, FlexAttention computes all scores densely: right, but of no use on a GPU
    return torch.compile(flex_attention, dynamic=True)


# torch.compile would make the lengths of a batch part of the compiled code, and compile anew for every batch
@torch.compiler.disable
def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PackedMask | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    query_scale: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of all our language models, called by their layers.

    Args:
        query: (B, H, T, D); key and value (B, G, T, D), H a multiple of G.
        attention_mask: a `PackedMask` or `BlockMask` for a packed row (B = 1), else whatever `sdpa` takes.
        scaling: of the scores; None: D ** -0.5.
        query_scale: (B, T) factors on the queries (Qwen v1's log-n attention).

    Returns:
        (B, T, H, D), and None in place of attention weights.
    """
    if query_scale is not None:
        query = query * query_scale[:, None, :, None].to(query.dtype)
    if isinstance(attention_mask, PackedMask):
        rows = _packed_attention(query, key, value, attention_mask, {"dropout_p": dropout, "scale": scaling})
        return rows.transpose(1, 2), None
    if isinstance(attention_mask, BlockMask):
        flex = _compiled_flex_attention() if query.device.type == "cuda" else flex_attention
        rows = flex(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return rows.transpose(1, 2), None
    sdpa = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PackedMask, settings: dict[str, Any]
) -> torch.Tensor:
    """(1, H, T, D): sample by sample, its prefix as plain causal attention, then all its branches under one mask.

    One call for all branches of a sample took as long as a call for each (two CPU cores, 1 and 5 branches of 70 tokens
    behind 740), and it copies no keys.
    """
    heads_per_key = query.shape[1] // key.shape[1]
    rows = []
    start = 0
    for number, lengths in enumerate(mask.layout.samples):
        end, size = start + sum(lengths), sum(lengths)
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        first = 0  # first row of the sample that needs a mask
        if mask.window is None:
            first = lengths[0]
            prefix = (q[:, :, :first], k[:, :, :first], v[:, :, :first])
            rows.append(scaled_dot_product_attention(*prefix, is_causal=True, enable_gqa=True, **settings))
        if first < size:
            # with a mask, CUDA's fast kernels take no grouped heads; the copy is small beside the layer's other work
            k, v = k.repeat_interleave(heads_per_key, dim=1), v.repeat_interleave(heads_per_key, dim=1)
            scores = mask.dense(number, like=q)
            rows.append(scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=scores, **settings))
        start = end
    return torch.cat(rows, dim=2)


def register_attention() -> None:
    """Make `ATTENTION` known to transformers; ordinary masks are built as for `sdpa`."""
    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
