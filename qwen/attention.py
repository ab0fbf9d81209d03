"""Attention over samples that follow one another in a single row, each with branches that share its prefix.

    row 0:  [prefix of sample 1][branch][branch] … [prefix of sample 2][branch] … [sample without branches] …

A token sees the earlier ones of its prefix and of its own branch, and nothing of other samples. `batch.Batch.samples`
gives the lengths; `Mqwen.py` hands them to every layer as a `PackedMask`; the function registered here computes what
they say. Ordinary masks (answering, generation) go to transformers' own `sdpa`.

Shapes: B batch, H and G query and key heads, T tokens of the row, L of one sample, D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from batch import Samples, sample_positions

ATTENTION = "shared_prefix"  # the name transformers knows it by


def _branch_numbers(lengths: tuple[int, ...]) -> torch.Tensor:
    """(L,) 0 for the prefix, 1, 2, … for the branches."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@dataclass
class PackedMask:
    """The mask of one kind of layers over a packed row; passed in place of a mask tensor.

    Attributes:
        samples: the parts of the row.
        window: a token sees so many positions back, itself included; None: all.
    """

    samples: Samples
    window: int | None
    _dense: dict[tuple, torch.Tensor] = field(default_factory=dict)  # one set for all layers of a step

    def dense(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Scores to add within sample `number`, 0 or -inf, of dtype and device of `like`: (L - prefix, L) for the
        rows of its branches, or (L, L) where there is a window."""
        key = (number, like.dtype, like.device)
        if key not in self._dense:
            lengths = self.samples[number]
            position, branch = sample_positions(lengths), _branch_numbers(lengths)
            first = lengths[0] if self.window is None else 0
            distance = position[first:, None] - position[None, :]
            visible = (distance >= 0) & ((branch[None, :] == 0) | (branch[first:, None] == branch[None, :]))
            if self.window is not None:
                visible &= distance < self.window
            scores = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, -torch.inf)
            self._dense[key] = scores.to(like.device)
        return self._dense[key]


# torch.compile would make the lengths of a batch part of the compiled code, and compile anew for every batch
@torch.compiler.disable
def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of our language models, called by their layers.

    Args:
        query: (B, H, T, D); key and value (B, G, T, D), H a multiple of G.
        attention_mask: a `PackedMask` for a packed row (B = 1), else whatever `sdpa` takes.
        scaling: of the scores; None: D ** -0.5.

    Returns:
        (B, T, H, D), and None in place of attention weights.
    """
    if isinstance(attention_mask, PackedMask):
        rows = _packed_attention(query, key, value, attention_mask, {"dropout_p": dropout, "scale": scaling})
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
    for number, lengths in enumerate(mask.samples):
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
