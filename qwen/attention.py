"""Attention over a packed row of samples, each with branches that share its prefix.

    row 0:  [prefix of sample 1][branch][branch] … [prefix of sample 2][branch] … [sample without branches] …

A token attends to earlier tokens of its prefix and of its own branch, never to other samples. `batch.Batch.lengths`
has the lengths, and `Mqwen.py` passes them to every layer as a `PackedMask`. The function registered here computes the
attention. When questions are answered together, the keys of the row are kept in a `BranchCache`, and passes of new
tokens come with a `NewTokensMask`. Ordinary masks (one answer, generation) go to transformers' `sdpa`.

Shapes: B batch, H and G query and key heads, T tokens of the row, L of one sample, D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from batch import Lengths, sample_positions
from compat import has_flash_attention
from qwen.branches import BranchCache, NewTokensMask
from qwen.varlen import Sequences, split_row, varlen_attention

ATTENTION = "shared_prefix"  # its name in transformers


def _branch_numbers(lengths: tuple[int, ...]) -> torch.Tensor:
    """Return (L,): 0 for the prefix, 1, 2, … for the branches."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@dataclass
class AttentionRecord:
    """Attention weights of some tokens of a row of one sample without branches, for `answering/heatmap.py`.

    The fused attention returns no weights, so those of these tokens are computed beside it.

    Attributes:
        tokens: (S,) positions in the row.
        layers: numbers of the recorded layers.
        weights: mean over the heads, (S, T) by layer.
    """

    tokens: torch.Tensor
    layers: frozenset[int]
    weights: dict[int, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def keep(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, window: int | None, scaling: float | None
    ) -> None:
        """Add the weights of a layer; arguments as in `shared_prefix_attention`."""
        if layer not in self.layers:
            return
        tokens = self.tokens.to(query.device)
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], dim=0).float()  # (H, T, D)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query[0, :, tokens].float() @ keys.transpose(1, 2) * scale  # (H, S, T)
        distance = tokens[:, None] - torch.arange(keys.shape[1], device=query.device)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        self.weights[layer] = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)


@dataclass
class PackedMask:
    """Mask of one layer type over a packed row, passed instead of a mask tensor.

    Attributes:
        lengths: segment lengths of the row.
        window: number of positions that a token attends to, itself included; None: all.
        cache: keeps keys and values for later tokens; None: nothing follows.
        record: keeps attention weights.
    """

    lengths: Lengths
    window: int | None
    cache: BranchCache | None = None
    record: AttentionRecord | None = None
    # shared by all layers of a step
    _dense: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _calls: dict[torch.device, list[Sequences]] = field(default_factory=dict)

    def calls(self, device: torch.device) -> list[Sequences]:
        """Return the row as sequences on `device`."""
        if device not in self._calls:
            self._calls[device] = split_row(self.lengths, device)
        return self._calls[device]

    def dense(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Return additive scores within sample `number`, 0 or -inf, in dtype and device of `like`.

        Their shape is (L - prefix, L) for the tokens of its branches, or (L, L) with a window.
        """
        key = (number, like.dtype, like.device)
        if key not in self._dense:
            lengths = self.lengths[number]
            position, branch = sample_positions(lengths), _branch_numbers(lengths)
            first = lengths[0] if self.window is None else 0
            distance = position[first:, None] - position[None, :]
            visible = (distance >= 0) & ((branch[None, :] == 0) | (branch[first:, None] == branch[None, :]))
            if self.window is not None:
                visible &= distance < self.window
            scores = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, -torch.inf)
            self._dense[key] = scores.to(like.device)
        return self._dense[key]


# torch.compile would specialise the code on the lengths of a batch and recompile it for every batch
@torch.compiler.disable
def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PackedMask | NewTokensMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of our language models, called by their layers.

    Args:
        query: (B, H, T, D); key and value (B, G, T, D), H a multiple of G.
        attention_mask: a `PackedMask` for a packed row (B = 1), a `NewTokensMask` for new tokens of its branches
            (B = 1), else a mask for `sdpa`.
        scaling: factor of the scores; None: D ** -0.5.

    Returns:
        (B, T, H, D), and None in place of attention weights.
    """
    if isinstance(attention_mask, NewTokensMask):
        cache, window = attention_mask.cache, attention_mask.window
        return cache.attend(module.layer_idx, query, key, value, window, scaling), None
    if isinstance(attention_mask, PackedMask):
        if attention_mask.cache is not None:
            attention_mask.cache.keep(module.layer_idx, key, value)
        if attention_mask.record is not None:
            attention_mask.record.keep(module.layer_idx, query, key, attention_mask.window, scaling)
        if dropout == 0 and has_flash_attention(query):
            calls, window = attention_mask.calls(query.device), attention_mask.window
            return varlen_attention(query, key, value, calls, window, scaling), None
        return _packed_attention(query, key, value, attention_mask, {"dropout_p": dropout, "scale": scaling}), None
    sdpa = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PackedMask, settings: dict[str, Any]
) -> torch.Tensor:
    """Compute (1, T, H, D) per sample: causal attention for the prefix, then all branches with one mask.

    One call for all branches of a sample took as long as one call per branch (two CPU cores, 1 and 5 branches of 70
    tokens after 740), and it copies no keys.
    """
    heads_per_key = query.shape[1] // key.shape[1]
    rows = []
    start = 0
    for number, lengths in enumerate(mask.lengths):
        end, size = start + sum(lengths), sum(lengths)
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        first = 0  # first row of the sample that needs a mask
        if mask.window is None:
            first = lengths[0]
            prefix = (q[:, :, :first], k[:, :, :first], v[:, :, :first])
            rows.append(scaled_dot_product_attention(*prefix, is_causal=True, enable_gqa=True, **settings))
        if first < size:
            if q.is_cuda:
                # with a mask, CUDA's fast kernels do not support grouped heads; the copy costs little beside the layer
                k, v = k.repeat_interleave(heads_per_key, dim=1), v.repeat_interleave(heads_per_key, dim=1)
            scores = mask.dense(number, like=q)
            grouped = {"enable_gqa": not q.is_cuda} | settings
            rows.append(scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=scores, **grouped))
        start = end
    return torch.cat([row.transpose(1, 2) for row in rows], dim=1)  # contiguous, as the output layer reads it


def register_attention() -> None:
    """Register `ATTENTION` with transformers; ordinary masks are built as for `sdpa`.

    cuDNN's attention is switched off. It plans every new shape anew, for milliseconds, and a packed row hardly
    ever has the shape of an earlier one. On an H100, half of a training step of a 135M model went into these plans.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
