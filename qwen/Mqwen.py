"""Qwen2, Qwen3 and Llama language models with image features at `<|extra_0|>` and a loss for packed rows.

The classes add two steps to transformers' classes. `fuse_image_features` replaces the embedding of each placeholder in
`input_ids` by the next row of image features. `packed_loss` computes the loss of a packed row at its supervised
positions only. Loaded by `qwen/loading.py`.

Shapes: B batch, T text and image tokens, M image tokens in all, Dl width, V vocabulary, S supervised positions.
"""

from collections.abc import Hashable

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from batch import Lengths
from compat import has_device_hook
from qwen.attention import AttentionRecord, PackedMask
from qwen.branches import BranchCache, NewTokensMask, TokensBefore
from qwen.chat import IGNORE_INDEX
from qwen.lean import run_layer

# rows of logits in memory at once: 156 MB in float32 at a vocabulary of 151,936
LOSS_ROWS = 256
FP16_GRADIENT_SCALE = 1024.0  # a power of two: exact in every dtype


def fuse_image_features(
    embeddings: torch.Tensor, image_features: torch.Tensor, is_image_token: torch.Tensor
) -> torch.Tensor:
    """Replace the placeholders' embeddings by image features.

    Args:
        embeddings: (B, T, Dl) of the text.
        image_features: (M, Dl) or (crops, tokens, Dl), in reading order of the placeholders.
        is_image_token: (B, T) bool.

    Returns:
        (B, T, Dl), a new tensor.

    Raises:
        ValueError: the number of placeholders is not M; gives both numbers.
    """
    placeholders = int(is_image_token.sum())
    rows = image_features.reshape(-1, image_features.shape[-1]).to(embeddings.dtype)  # (M, Dl)
    if placeholders != len(rows):
        raise ValueError(
            f"{placeholders} image placeholders in input_ids but {len(rows)} image features: every photo's placeholder "
            "must stand once for each of its tokens"
        )
    return embeddings.masked_scatter(is_image_token.unsqueeze(-1), rows)


class _CrossEntropyOfFrozenHead(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` with logits of at most `LOSS_ROWS` positions in memory.

    The forward pass also computes the gradient of the hidden states, so the logits need not be kept.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(S, Dl), (S,), (V, Dl) → scalar in float32, or float64 for float64 weights."""
        losses, gradients = [], []
        for rows, target in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            logits = functional.linear(rows, weight)  # (rows, V), in the dtype autocast picks
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = target.unsqueeze(1)
            scores -= scores.amax(dim=1, keepdim=True)
            score_of_target = scores.gather(1, target)
            norm = scores.exp_().sum(dim=1, keepdim=True)
            losses.append(norm.log() - score_of_target)
            if ctx.needs_input_grad[0]:
                gradient = scores.div_(norm).scatter_add_(1, target, torch.full_like(norm, -1))
                # in fp16, the probability of an unlikely token would round to 0
                gradient *= FP16_GRADIENT_SCALE
                gradients.append((gradient.to(logits.dtype) @ weight.to(logits.dtype)).to(norm.dtype))
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(torch.cat(gradients) / FP16_GRADIENT_SCALE if gradients else None)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.hidden_dtype), None, None


def _summed_cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
    logits = lm_head(hidden)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(scores, targets, reduction="sum")


def supervised_loss(
    hidden: torch.Tensor, targets: torch.Tensor, lm_head: torch.nn.Module, num_items: int | None
) -> torch.Tensor:
    """Cross-entropy of `lm_head(hidden)` with logits of at most `LOSS_ROWS` positions in memory.

    Args:
        hidden: (S, Dl) after the last norm, at the positions that predict a supervised token.
        targets: (S,) these tokens.
        lm_head: a frozen linear layer without bias; any other module costs a second forward pass.
        num_items: divisor of the summed loss; None: S.

    Returns:
        float32 scalar (float64 for such a model); 0 with a graph when nothing is supervised.
    """
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad:
        total = _CrossEntropyOfFrozenHead.apply(hidden, targets, lm_head.weight)
    else:
        parts = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        losses = (checkpoint(_summed_cross_entropy, *part, lm_head, use_reentrant=False) for part in parts)
        total = sum(losses, start=hidden.new_zeros(()))
    return total / (num_items if num_items is not None else max(len(targets), 1))


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`labels` (1, T) → mask (1, T) of the positions that predict a supervised token, and these tokens (S,)."""
    predicts = functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return predicts, labels.roll(-1)[predicts]


class ReadsImages(torch.nn.Module):
    """Methods that our classes add to transformers' causal language models."""

    image_token_id: int  # set by load_language_model
    whole_layers = False  # call layers as modules, because they are compiled

    @property
    def longest_packed(self) -> int:
        """Number of tokens of the longest sequence that `packed_states` computes as an ordinary forward pass does."""
        return self.config.max_position_embeddings

    @property
    def windows(self) -> list[int | None]:
        """Sliding window of each layer in tokens; None: a layer without one."""
        kinds, window = self.config.layer_types, self.config.sliding_window
        return [window if kind == "sliding_attention" else None for kind in kinds]

    @property
    def equal_passes(self) -> bool:
        """Whether a pass of one new token does the same at every position, so that a CUDA graph can repeat it."""
        return self.config.rope_parameters["rope_type"] not in ("dynamic", "longrope")

    def prefix_key(self, length: int) -> Hashable:
        """Return a value that the keys of a prompt of `length` tokens depend on, besides the tokens.

        The answering engine reuses cached keys only if this value is equal.
        """
        return None

    def embed(self, input_ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, T)` ids and `(crops, tokens, Dl)` or `(M, Dl)` projected features → `(B, T, Dl)` input embeddings.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if images is None:
            images = embeddings.new_zeros(0, embeddings.shape[-1])
        return fuse_image_features(embeddings, images, input_ids == self.image_token_id)

    def packed_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Lengths,
        num_items: int | None = None,
    ) -> torch.Tensor:
        """Next-token loss of a packed row, computed at its supervised positions only.

        Args:
            embeddings: (1, T, Dl) of `embed`.
            labels: (1, T), -100 at unsupervised positions.
            position_ids: (1, T), from 0 in each sample.
            lengths: segment lengths of the row (`batch.Batch`).
            num_items: divisor of the summed loss; None: the number of supervised tokens in this row.
        """
        predicts, targets = supervised_positions(labels)
        hidden = self.packed_states(embeddings, position_ids, lengths, predicts)  # (S, Dl)
        return supervised_loss(hidden, targets, self.lm_head, num_items)

    def packed_states(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Lengths | None,
        selected: torch.Tensor | None = None,
        cache: BranchCache | TokensBefore | None = None,
        record: AttentionRecord | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm: (1, T, Dl), or (S, Dl) where `selected` (1, T) is true.

        Calls the layers directly instead of transformers' loop, because the MLP of the last layer runs only at the
        selected positions, and `run_layer` keeps less for the backward pass.

        Args:
            embeddings, position_ids: as in `packed_loss`.
            lengths: segment lengths of the row, whose keys a `BranchCache` keeps; None: the row has one new token of
                each question that `cache` made room for.
            selected: (1, T) bool.
            cache: keeps the keys and values of the row, for answering.
            record: keeps attention weights of the row.
        """
        windows = self.windows
        if lengths is not None:
            assert cache is None or isinstance(cache, BranchCache), "only a BranchCache keeps the keys of a row"
            masks = {window: PackedMask(lengths, window, cache, record) for window in set(windows)}
        else:
            assert cache is not None, "new tokens need the keys of the tokens before them"
            masks = {window: NewTokensMask(cache, window) for window in set(windows)}
        arguments = {
            "position_ids": position_ids,
            "position_embeddings": self.model.rotary_emb(embeddings, position_ids),
        }
        hidden, last = embeddings, len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            mask = masks[windows[index]]
            chosen = selected if index == last else None
            if self.whole_layers or has_device_hook(layer):
                hidden = layer(hidden, attention_mask=mask, **arguments)
                hidden = hidden if chosen is None else hidden[chosen.to(hidden.device)]
            elif layer.gradient_checkpointing and torch.is_grad_enabled() and chosen is None:
                keywords = {"keep": True, "attention_mask": mask, **arguments}
                hidden = checkpoint(run_layer, layer, hidden, use_reentrant=False, **keywords)
            else:
                hidden = run_layer(layer, hidden, chosen, attention_mask=mask, **arguments)  # (S, Dl) if chosen
        return self.model.norm(hidden)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) of hidden states, on the embeddings' device; `llm.device_map` may put the head on another."""
        return self.lm_head(states).to(self.get_input_embeddings().weight.device)


class MQwen2ForCausalLM(ReadsImages, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class MQwen3ForCausalLM(ReadsImages, Qwen3ForCausalLM):
    """Qwen3, dense."""


class MLlamaForCausalLM(ReadsImages, LlamaForCausalLM):
    """Llama, whose layers are Qwen2's without biases: for small models with Qwen's prompt format, such as SmolLM2."""

    @property
    def windows(self) -> list[int | None]:
        return [None] * self.config.num_hidden_layers
