"""Qwen v1 (`Qwen-1_8B`, `Qwen-7B`, `Qwen-14B` and their `-Chat`) as a Qwen2 model: config, weight names, positions.

Its weights are Qwen2's under other names, so no code of the checkpoint runs. transformers' loader renames them and
splits the fused query-key-value matrix, tensor by tensor. In eval mode, Qwen v1 differs from Qwen2 for sequences longer
than `seq_length` (8192 tokens in the published models). The rotary base grows (dynamic NTK), and queries are scaled by
the logarithm of their position (log-n). Used by `qwen/loading.py` only.
"""

import json
import math
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from batch import Lengths
from compat import register_weight_names
from errors import UserError
from qwen.attention import AttentionRecord, shared_prefix_attention
from qwen.branches import BranchCache, TokensBefore
from qwen.Mqwen import ReadsImages

ATTENTION = "shared_prefix_logn"  # name of its attention function in transformers

# the published code has log-n factors for this many positions and fails beyond them
MAX_LENGTH = 32767
# settings of the published checkpoints that the mapping to Qwen2 requires
REQUIRED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False}
LAYER_NAMES = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


class Qwen1Config(Qwen2Config):
    """Qwen2's config with Qwen v1's settings for positions beyond `seq_length` tokens."""

    model_type = "qwen"
    seq_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True


def read_config(folder: Path) -> Qwen1Config:
    """Read the `config.json` of a Qwen v1 checkpoint as a Qwen2 config.

    Raises:
        UserError: a setting that no published Qwen v1 checkpoint has; names it.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in REQUIRED.items():
        if raw[key] != value:
            raise UserError(f"'llm.path': {folder / 'config.json'} has {key}={raw[key]}, only {value} is supported")
    return Qwen1Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"] // 2,  # Qwen v1 counts gate and up together
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_attention_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["layer_norm_epsilon"],
        initializer_range=raw["initializer_range"],
        rope_parameters={"rope_type": "default", "rope_theta": float(raw["rotary_emb_base"])},
        tie_word_embeddings=False,
        seq_length=raw["seq_length"],
        use_dynamic_ntk=raw["use_dynamic_ntk"],
        use_logn_attn=raw["use_logn_attn"],
    )


def register_names(class_name: str) -> None:
    """Register the names of Qwen v1's tensors for the model class `class_name` with transformers' loader."""
    outer = {
        r"transformer\.h\.": "model.layers.",
        r"transformer\.wte\.": "model.embed_tokens.",
        r"transformer\.ln_f\.": "model.norm.",
    }
    layers = {rf"\.{old}\.".replace("attn.c", r"attn\.c"): f".{new}." for old, new in LAYER_NAMES.items()}
    fused = {"attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    register_weight_names(class_name, outer | layers, fused)


class Qwen1RotaryEmbedding(torch.nn.Module):
    """Rotary positions; the base grows with `ntk_alpha` (B,), which the model sets before each forward pass."""

    def __init__(self, config: Qwen1Config) -> None:
        super().__init__()
        self.base = config.rope_parameters["rope_theta"]
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.ntk_alpha: list[float] = [1.0]

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, T, head_dim) for `position_ids` (B, T), in the dtype of `hidden_states`."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device).float() / self.head_dim
        bases = [self.base * alpha ** (self.head_dim / (self.head_dim - 2)) for alpha in self.ntk_alpha]
        inverse_frequency = torch.stack([1.0 / base**exponents for base in bases])  # (B or 1, head_dim / 2)
        angles = position_ids[..., None].float() * inverse_frequency[:, None, :]  # (B, T, head_dim / 2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def ntk_alpha(length: int, config: Qwen1Config) -> float:
    """Factor of the rotary base for a prompt of `length` tokens: 1 up to `seq_length`, then 3, 7, 15 …"""
    if not config.use_dynamic_ntk:
        return 1.0
    return max(2.0 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1.0, 1.0)


def logn_scale(position_ids: torch.Tensor, config: Qwen1Config) -> torch.Tensor | None:
    """Factors of the queries at `position_ids` (B, T), of the same shape; None where log-n is off.

    Raises:
        UserError: positions beyond `MAX_LENGTH`.
    """
    length = int(position_ids.max()) + 1
    if length > MAX_LENGTH:
        raise UserError(f"{length} tokens: Qwen v1 reads at most {MAX_LENGTH}, its code has no factors beyond that")
    if not config.use_logn_attn:
        return None
    # whole numbers up to MAX_LENGTH are exact in float32; Apple's MPS has no float64
    return ((position_ids + 1).float().log() / math.log(config.seq_length)).clamp(min=1.0)


def logn_attention(
    module: torch.nn.Module, query: torch.Tensor, *rest, query_scale: torch.Tensor | None = None, **kwargs
) -> tuple[torch.Tensor, None]:
    """`shared_prefix_attention` with the queries (B, H, T, D) multiplied by `query_scale` (B, T) first."""
    if query_scale is not None:
        query = query * query_scale[:, None, :, None].to(query.dtype)
    return shared_prefix_attention(module, query, *rest, **kwargs)


def register_attention() -> None:
    """Register `ATTENTION` with transformers."""
    AttentionInterface.register(ATTENTION, logn_attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


class MQwen1ForCausalLM(ReadsImages, Qwen2ForCausalLM):
    """Qwen v1; in eval mode, sequences longer than `seq_length` are treated as in the published code."""

    config_class = Qwen1Config

    def __init__(self, config: Qwen1Config) -> None:
        super().__init__(config)
        self.model.rotary_emb = Qwen1RotaryEmbedding(config)

    @property
    def longest_packed(self) -> int:
        """As the parent's; beyond it, positions depend on the length of the whole prompt."""
        return self.config.seq_length

    @property
    def equal_passes(self) -> bool:
        return False  # positions and queries depend on the length

    def prefix_key(self, length: int) -> float:
        """As the parent's; keys of a longer prompt are rotated with another base."""
        return ntk_alpha(length, self.config)

    def packed_states(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: Lengths | None,
        selected: torch.Tensor | None = None,
        cache: BranchCache | TokensBefore | None = None,
        record: AttentionRecord | None = None,
    ) -> torch.Tensor:
        """As the parent's.

        Raises:
            UserError: a sample longer than `seq_length` in eval mode, where each question would need its own
                positions.
        """
        end = int(position_ids.max()) + 1
        if not self.training and end > self.config.seq_length:
            raise UserError(
                f"packed questions of {end} tokens: beyond {self.config.seq_length} Qwen v1 places tokens by the "
                f"length of the whole prompt; lower data.max_length to {self.config.seq_length}"
            )
        self.model.rotary_emb.ntk_alpha = [1.0]
        return super().packed_states(embeddings, position_ids, lengths, selected, cache, record)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the parent class.

        Raises:
            UserError: a sequence longer than the original code can read.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None, "give 'input_ids' or 'inputs_embeds'"
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        end = start + tokens.shape[1]
        alphas = [1.0]
        if not self.training and end > self.config.seq_length:
            positions = torch.arange(start, end, device=tokens.device)[None] if position_ids is None else position_ids
            kwargs["query_scale"] = logn_scale(positions, self.config)
            if past_key_values is not None and start > 0:
                alphas = past_key_values.ntk_alpha  # cached keys were rotated with this base
            else:
                lengths = [end] if attention_mask is None else attention_mask.sum(-1).tolist()
                alphas = [ntk_alpha(length, self.config) for length in lengths]
        if past_key_values is not None:
            past_key_values.ntk_alpha = alphas
        self.model.rotary_emb.ntk_alpha = alphas
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
