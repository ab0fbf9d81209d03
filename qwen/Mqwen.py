"""Qwen2 and Qwen3 language models that read image features in place of `<|extra_0|>`.

The classes are transformers' own plus one step: where `input_ids` holds the placeholder, the embedding is replaced by
the next row of the image features (`fuse_image_features`). Built by `model/model.py`.

Shapes: B batch, T text and image tokens, N image tokens of a photo, Dl width, V vocabulary, S supervised positions.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from errors import UserError
from qwen import qwen1
from qwen.attention import PackedLayout, PackedMask, flex_mask
from qwen.chat import IGNORE_INDEX

# rows of logits in memory at once: 156 MB in float32 at a vocabulary of 151,936
LOSS_ROWS = 256
FP16_GRADIENT_SCALE = 1024.0  # a power of two: exact in every dtype


def fuse_image_features(
    embeddings: torch.Tensor, image_features: torch.Tensor, is_image_token: torch.Tensor
) -> torch.Tensor:
    """Put image features where the placeholders stand.

    Args:
        embeddings: (B, T, Dl) of the text.
        image_features: (B_img, N, Dl), photos in reading order of their placeholders.
        is_image_token: (B, T) bool.

    Returns:
        (B, T, Dl), a new tensor.

    Raises:
        ValueError: the number of placeholders is not B_img * N; gives both numbers.
    """
    placeholders = int(is_image_token.sum())
    num_images, tokens_per_image, width = image_features.shape
    if placeholders != num_images * tokens_per_image:
        raise ValueError(
            f"{placeholders} image placeholders in input_ids but {num_images} photos with {tokens_per_image} tokens "
            f"each = {num_images * tokens_per_image} image features: every photo's placeholder must stand "
            f"{tokens_per_image} times"
        )
    rows = image_features.reshape(-1, width).to(embeddings.dtype)  # (B_img * N, Dl)
    return embeddings.masked_scatter(is_image_token.unsqueeze(-1), rows)


class _CrossEntropyOfFrozenHead(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` that never holds the logits of more than `LOSS_ROWS` positions.

    The gradient of the hidden states is known as soon as the logits are, so it is taken at once and the logits go.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(S, Dl), (S,), (V, Dl) → scalar in float32, or float64 where the weights are."""
        losses, gradients = [], []
        for rows, wanted in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            logits = functional.linear(rows, weight)  # (rows, V), in the dtype autocast picks
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            wanted = wanted.unsqueeze(1)
            scores -= scores.amax(dim=1, keepdim=True)
            score_of_target = scores.gather(1, wanted)
            norm = scores.exp_().sum(dim=1, keepdim=True)
            losses.append(norm.log() - score_of_target)
            if ctx.needs_input_grad[0]:
                gradient = scores.div_(norm).scatter_add_(1, wanted, torch.full_like(norm, -1))
                # in fp16, the share of an unlikely word would round to 0
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
    hidden_states: torch.Tensor, labels: torch.Tensor, lm_head: torch.nn.Module, num_items_in_batch: int | None
) -> torch.Tensor:
    """Next-token cross-entropy that asks `lm_head` for the S supervised positions only, `LOSS_ROWS` of them at a time.

    Args:
        hidden_states: (B, T, Dl) after the last norm.
        labels: (B, T), -100 where nothing is asked.
        lm_head: a frozen linear layer without bias, or anything else, which then costs a second forward pass of it.
        num_items_in_batch: divisor of the summed loss; None: S, the mean over this batch.

    Returns:
        float32 scalar (float64 for such a model); 0 with a graph when nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX  # (B, T-1)
    hidden, targets = hidden_states[:, :-1][supervised], targets[supervised]  # (S, Dl), (S,)
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None and not lm_head.weight.requires_grad:
        total = _CrossEntropyOfFrozenHead.apply(hidden, targets, lm_head.weight)
    else:
        parts = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        losses = (checkpoint(_summed_cross_entropy, *part, lm_head, use_reentrant=False) for part in parts)
        total = sum(losses, start=hidden.new_zeros(()))
    return total / (num_items_in_batch if num_items_in_batch is not None else max(len(targets), 1))


class SupervisedRows:
    """Lets the MLP of the last layer work on some positions alone: what it gives at the others, nobody reads.

    Attributes:
        mask: (B, T) bool, the positions; None: all.
    """

    def __init__(self, mlp: torch.nn.Module) -> None:
        self.mask: torch.Tensor | None = None
        mlp.register_forward_pre_hook(self._select)
        mlp.register_forward_hook(self._spread)

    def _select(self, mlp: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return arguments if self.mask is None else (arguments[0][self.mask],)  # (B, T, Dl) → (S, Dl)

    def _spread(self, mlp: torch.nn.Module, arguments: tuple, rows: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return rows
        everywhere = rows.new_zeros(*self.mask.shape, rows.shape[-1])
        return everywhere.masked_scatter(self.mask.unsqueeze(-1), rows)  # (B, T, Dl)


class ImageInputs(torch.nn.Module):
    """What our classes add to transformers' causal language models: `images`, and a loss without full logits."""

    image_token_id: int  # set by load_language_model
    last_mlp: SupervisedRows  # likewise

    def position_scaling(self, length: int) -> float:
        """How positions are stretched for a prompt of `length` tokens. Keys computed under one value cannot be mixed
        with those of another, so the answering engine reuses none when it changes."""
        return 1.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        supervised_only: bool = False,
        num_items_in_batch: int | None = None,
        layout: PackedLayout | None = None,
        flex: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the parent class, and:

        Args:
            attention_mask: (B, T) or a 4D bool mask (B, 1, T, T), True where a position may look.
            images: (B_img, N, Dl) projected features for the placeholders in `input_ids`.
            supervised_only: compute `loss` from the labelled positions alone; `logits` is then None.
            num_items_in_batch: divisor of the summed loss (supervised tokens of the whole optimiser step).
            layout: what stands where in the one row of packed training, in place of `attention_mask`.
            flex: compute a `layout` with FlexAttention.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "give 'input_ids' or 'inputs_embeds'"
            inputs_embeds = self.embed_with_images(input_ids, images)
        if layout is not None and position_ids is None:
            position_ids = layout.positions().to(inputs_embeds.device)
        if layout is None:
            masks = self._masks(attention_mask, position_ids, inputs_embeds, kwargs.get("past_key_values"))
        else:
            masks = self._packed_masks(layout, flex, inputs_embeds.device)
        if not supervised_only:
            return super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=masks,
                position_ids=position_ids,
                labels=labels,
                **({} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}),
                **kwargs,
            )
        assert labels is not None, "'supervised_only' needs 'labels'"
        # where activations are computed again in the backward pass, that must find what the forward pass found
        if not (self.training and self.model.layers[-1].gradient_checkpointing):
            self.last_mlp.mask = functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        try:
            outputs = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=masks,
                position_ids=position_ids,
                **kwargs | {"use_cache": False},
            )
        finally:
            self.last_mlp.mask = None
        loss = supervised_loss(outputs.last_hidden_state, labels, self.lm_head, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    def embed_with_images(self, input_ids: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """`(B, T)` ids and `(B_img, N, Dl)` features → `(B, T, Dl)` input embeddings; errors as `forward`."""
        embeddings = self.get_input_embeddings()(input_ids)
        if images is None:
            images = embeddings.new_zeros(0, 1, embeddings.shape[-1])
        return fuse_image_features(embeddings, images, input_ids == self.image_token_id)

    def _masks(
        self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, embeddings: torch.Tensor, cache: object
    ) -> Any:
        """`forward`'s `attention_mask` in the form in which transformers does with it what was meant."""
        if mask is not None and mask.dim() == 4:
            return self._masks_by_layer_type(mask, position_ids, embeddings.dtype)
        if mask is None and position_ids is not None and cache is None:
            # without a mask, transformers guesses from restarting positions that sequences were packed
            return torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return mask

    def _packed_masks(self, layout: PackedLayout, flex: bool, device: torch.device) -> dict[str, object]:
        windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
        return {
            kind: flex_mask(layout, windows[kind], device) if flex else PackedMask(layout, windows[kind])
            for kind in set(self.config.layer_types)
        }

    def _masks_by_layer_type(
        self, mask: torch.Tensor, position_ids: torch.Tensor | None, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """A 4D mask would switch sliding windows off, so the window is cut into a second one. Distances are counted
        in positions, since rows of a packed sequence do not stand beside their predecessors."""
        masks = {"full_attention": mask}
        if "sliding_attention" in self.config.layer_types:
            if position_ids is None:
                position_ids = torch.arange(mask.shape[-1], device=mask.device).unsqueeze(0)
            distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]  # (B, 1, T, T)
            masks["sliding_attention"] = mask & (distance < self.config.sliding_window)
        # 0 and -inf to be added to the scores: a bool mask would be turned into that in every layer, twice
        return {name: torch.zeros_like(m, dtype=dtype).masked_fill(~m, -torch.inf) for name, m in masks.items()}


class MQwen2ForCausalLM(ImageInputs, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class MQwen3ForCausalLM(ImageInputs, Qwen3ForCausalLM):
    """Qwen3, dense."""


class MQwen1ForCausalLM(ImageInputs, Qwen2ForCausalLM):
    """Qwen v1. In eval mode it treats sequences longer than `seq_length` as its own code does (`qwen/qwen1.py`)."""

    config_class = qwen1.Qwen1Config

    def __init__(self, config: qwen1.Qwen1Config) -> None:
        super().__init__(config)
        self.model.rotary_emb = qwen1.Qwen1RotaryEmbedding(config)

    def position_scaling(self, length: int) -> float:
        """As the parent's; keys of a longer prompt are rotated with another base."""
        return qwen1.ntk_alpha(length, self.config)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        layout: PackedLayout | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `ImageInputs.forward`.

        Raises:
            UserError: also for packed sequences longer than `seq_length` in eval mode, where each question would need
                positions of its own, and for sequences longer than the original code can read.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None, "give 'input_ids' or 'inputs_embeds'"
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        if layout is not None:
            end = int(layout.positions().max()) + 1
        elif attention_mask is not None and attention_mask.dim() == 4 and position_ids is not None:
            end = int(position_ids.max()) + 1
        else:
            end = start + tokens.shape[1]
        alphas = [1.0]
        if not self.training and end > self.config.seq_length:
            if layout is not None or (attention_mask is not None and attention_mask.dim() == 4):
                raise UserError(
                    f"packed questions of {end} tokens: beyond {self.config.seq_length} Qwen v1 places tokens by the "
                    f"length of the whole prompt; lower data.max_length to {self.config.seq_length}"
                )
            positions = torch.arange(start, end, device=tokens.device)[None] if position_ids is None else position_ids
            kwargs["query_scale"] = qwen1.logn_scale(positions, self.config)
            if past_key_values is not None and start > 0:
                alphas = past_key_values.ntk_alpha  # keys in the cache keep the base they were rotated with
            else:
                lengths = [end] if attention_mask is None else attention_mask.sum(-1).tolist()
                alphas = [self.position_scaling(length) for length in lengths]
        if past_key_values is not None:
            past_key_values.ntk_alpha = alphas
        self.model.rotary_emb.ntk_alpha = alphas
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            layout=layout,
            **kwargs,
        )


LANGUAGE_MODELS = {"qwen": MQwen1ForCausalLM, "qwen2": MQwen2ForCausalLM, "qwen3": MQwen3ForCausalLM}
