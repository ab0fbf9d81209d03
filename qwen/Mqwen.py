"""Qwen2 and Qwen3 language models that read image features in place of `<|extra_0|>`.

The classes are transformers' own plus one step: where `input_ids` holds the placeholder, the embedding is replaced by
the next row of the image features (`fuse_image_features`). Built by `model/model.py`.

Shapes: B batch, T text and image tokens, N image tokens of a photo, Dl width, V vocabulary, S supervised positions.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from config import require_complete
from qwen import qwen1
from qwen.attention import ATTENTION
from qwen.chat import IGNORE_INDEX


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


def supervised_loss(
    hidden_states: torch.Tensor, labels: torch.Tensor, lm_head: torch.nn.Module, num_items_in_batch: int | None
) -> torch.Tensor:
    """Next-token cross-entropy that asks `lm_head` for the S supervised positions only.

    Args:
        hidden_states: (B, T, Dl) after the last norm.
        labels: (B, T), -100 where nothing is asked.
        num_items_in_batch: divisor of the summed loss; None: S, the mean over this batch.

    Returns:
        float32 scalar; 0 with a graph when nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX  # (B, T-1)
    logits = lm_head(hidden_states[:, :-1][supervised]).float()  # (S, V)
    total = functional.cross_entropy(logits, targets[supervised], reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else max(int(supervised.sum()), 1))


class ImageInputs:
    """What our classes add to transformers' causal language models: `images`, and a loss without full logits."""

    image_token_id: int  # set by load_language_model

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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the parent class, and:

        Args:
            attention_mask: (B, T) or a 4D bool mask (B, 1, T, T), True where a position may look (packed training).
            images: (B_img, N, Dl) projected features for the placeholders in `input_ids`.
            supervised_only: compute `loss` from the labelled positions alone; `logits` is then None.
            num_items_in_batch: divisor of the summed loss (supervised tokens of the whole optimiser step).

        Raises:
            ValueError: placeholders and features differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_with_images(input_ids, images)
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = self._masks_by_layer_type(attention_mask, position_ids, inputs_embeds.dtype)
        elif attention_mask is None and position_ids is not None and kwargs.get("past_key_values") is None:
            # without a mask, transformers guesses from restarting positions that sequences were packed
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        if not supervised_only:
            return super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                **({} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}),
                **kwargs,
            )
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
        loss = supervised_loss(outputs.last_hidden_state, labels, self.lm_head, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    def embed_with_images(self, input_ids: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """`(B, T)` ids and `(B_img, N, Dl)` features → `(B, T, Dl)` input embeddings; errors as `forward`."""
        embeddings = self.get_input_embeddings()(input_ids)
        if images is None:
            images = embeddings.new_zeros(0, 1, embeddings.shape[-1])
        return fuse_image_features(embeddings, images, input_ids == self.image_token_id)

    def _masks_by_layer_type(
        self, mask: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """A 4D mask would switch sliding windows off, so the window is cut into a second one. Distances are counted
        in positions, since rows of a packed sequence do not stand beside their predecessors."""
        masks = {"full_attention": mask}
        if "sliding_attention" in self.config.layer_types:
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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `ImageInputs.forward`.

        Raises:
            ValueError: also for packed sequences longer than `seq_length` in eval mode, where each question would need
                positions of its own, and for sequences longer than the original code can read.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        packed = attention_mask is not None and attention_mask.dim() == 4
        end = int(position_ids.max()) + 1 if packed else start + tokens.shape[1]
        alphas = [1.0]
        if not self.training and end > self.config.seq_length:
            if packed:
                raise ValueError(
                    f"packed questions of {end} tokens: beyond {self.config.seq_length} Qwen v1 places tokens by the "
                    f"length of the whole prompt; lower data.max_length to {self.config.seq_length}"
                )
            positions = torch.arange(start, end, device=tokens.device)[None] if position_ids is None else position_ids
            kwargs["query_scale"] = qwen1.logn_scale(positions, self.config)
            if start > 0:
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
            **kwargs,
        )


LANGUAGE_MODELS = {"qwen": MQwen1ForCausalLM, "qwen2": MQwen2ForCausalLM, "qwen3": MQwen3ForCausalLM}


def loading_options(
    dtype: torch.dtype, placement: torch.device | Literal["auto"], quantization: Literal["none", "nf4", "int8"]
) -> dict[str, Any]:
    """Keyword arguments of transformers' `from_pretrained`: weights go straight to their place in their last form.

    Args:
        dtype: of the weights; with quantisation of the products, and of what is not quantised (embedding, `lm_head`).
        placement: a device, or `auto`: spread over all GPUs and, where they do not suffice, the CPU.
        quantization: nf4 as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314), with its double quantisation.

    Raises:
        ValueError: quantisation without bitsandbytes.
    """
    options = {
        "dtype": dtype,
        "device_map": "auto" if placement == "auto" else {"": placement},
    }
    if quantization == "none":
        return options
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"'llm.quantization' is {quantization}, which needs bitsandbytes: pip install bitsandbytes==0.50.2, or set "
            "llm.quantization=none"
        )
    if quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        # it says in every layer of every step that activations become fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return options | {"quantization_config": settings}


def load_language_model(
    folder: Path,
    dtype: torch.dtype,
    image_token_id: int,
    vocabulary_size: int,
    placement: torch.device | Literal["auto"] = torch.device("cpu"),  # noqa: B008 - a constant
    quantization: Literal["none", "nf4", "int8"] = "none",
):
    """Load a Qwen checkpoint strictly; `dtype`, `placement` and `quantization` as in `loading_options`.

    Args:
        vocabulary_size: number of ids of the tokenizer, `<|extra_0|>` included; the embedding is resized only if it
            has fewer rows.

    Raises:
        ValueError: an unsupported architecture, tensors that are missing, left over or of the wrong shape, or
            quantisation without bitsandbytes.
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise ValueError(f"'llm.path': {folder} is of type '{model_type}'; supported: {known}")
    model_class = LANGUAGE_MODELS[model_type]
    if model_type == "qwen":
        config = qwen1.read_config(folder)
        qwen1.register_weight_names(model_class.__name__)
    else:
        config = AutoConfig.from_pretrained(folder)
    language_model, info = model_class.from_pretrained(
        folder,
        config=config,
        attn_implementation=ATTENTION,
        ignore_mismatched_sizes=True,  # require_complete names them; transformers would only say that there are some
        output_loading_info=True,
        **loading_options(dtype, placement, quantization),
    )
    require_complete(info, "llm.path", folder)
    language_model.image_token_id = image_token_id
    # published generation configs bring a repetition penalty and sampling; here only config section `generate` decides
    language_model.generation_config = GenerationConfig()
    if vocabulary_size > language_model.get_input_embeddings().weight.shape[0]:
        language_model.resize_token_embeddings(vocabulary_size)
    return language_model
