"""All uses of unstable library interfaces: private names, deep module paths, renamed methods.

`tests/test_compat.py` tests each line; the job with the newest versions runs these tests. Two other places copy code
of a library class and depend on its attributes: `qwen/Mqwen.py::packed_states` (a decoder layer) and `qwen/lora.py`
(peft's LoRA layer). Their tests compare both with the library.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

# AutoImageProcessor of transformers 5.17 requires torchvision, and torchvision's resize differs from Pillow's
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

__all__ = [
    "BitImageProcessorPil",
    "CLIPImageProcessorPil",
    "SequenceEnds",
    "SiglipImageProcessorPil",
    "ViTImageProcessorPil",
    "cache_prefix",
    "flash_backward",
    "flash_forward",
    "fp16_pack",
    "fp16_product",
    "fp16_unpack",
    "fused_rms_norm",
    "has_device_hook",
    "has_flash_attention",
    "has_fp16_product",
    "onednn_has_bf16",
    "register_weight_names",
    "send_no_gradients_of",
    "set_activation_checkpointing",
    "use_lora_layer",
]


def set_activation_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Turn the recomputation of the layers' activations in the backward pass on or off."""
    if hasattr(model, "activation_checkpointing_enable"):
        enable, disable = model.activation_checkpointing_enable, model.activation_checkpointing_disable
    else:  # transformers before 5.23
        enable, disable = model.gradient_checkpointing_enable, model.gradient_checkpointing_disable
    if on:
        enable({"use_reentrant": False})
    else:
        disable()


def register_weight_names(
    class_name: str, renamed: Mapping[str, str], split: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Register a checkpoint's tensor names for a model class with transformers' loader.

    Args:
        class_name: class of the loaded model.
        renamed: pattern in the checkpoint → name in the model, in order of application.
        split: fused matrix → the matrices that its rows form, in equal parts.
    """
    rules: list[WeightRenaming | WeightConverter] = [WeightRenaming(old, new) for old, new in renamed.items()]
    rules += [
        WeightConverter(source_patterns=old, target_patterns=list(news), operations=[Chunk(dim=0)])
        for old, news in (split or {}).items()
    ]
    register_checkpoint_conversion_mapping(class_name, rules, overwrite=True)


def cache_prefix(cache: DynamicCache, tokens: int) -> DynamicCache:
    """Return a cache with the first `tokens` tokens of `cache`, which stays as it is.

    They share memory until tokens are added to either, because that makes new tensors.
    """
    prefix = copy.copy(cache)
    prefix.layers = [copy.copy(layer) for layer in cache.layers]
    surplus = cache.get_seq_length() - tokens
    if surplus > 0:
        prefix.crop(-surplus)  # a negative count removes that many tokens, in 5.17 and 5.23
    return prefix


def use_lora_layer(settings: LoraConfig, layer: type[torch.nn.Module], base: type[torch.nn.Module]) -> None:
    """Make peft wrap each module of type `base` in `layer` instead of its own LoRA layer."""
    settings._register_custom_module({base: layer})


def send_no_gradients_of(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Exclude parameters and buffers from the communication of torch's DistributedDataParallel."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def onednn_has_bf16() -> bool:
    """Whether oneDNN may use bf16 instructions; see `model.precision.cpu_has_bf16`."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_fp16_product() -> bool:
    """Whether torch has FBGEMM's products with fp16 weights: on x86 CPUs, unless a later torch leaves them out."""
    engine = "fbgemm" in torch.backends.quantized.supported_engines
    return engine and hasattr(torch.ops.quantized, "linear_prepack_fp16")


def fp16_pack(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.ScriptObject:
    """Pack float32 weights (O, I) as fp16 for `fp16_product`."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def fp16_product(x: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    """(…, I) → (…, O), both float32; without a gradient."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


def fp16_unpack(packed: torch.ScriptObject) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rounded weights in float32, and the bias."""
    return torch.ops.quantized.linear_unpack_fp16(packed)


def has_device_hook(module: torch.nn.Module) -> bool:
    """Whether accelerate moves what `module` is called with to its device (`device_map`), not what its parts get."""
    return hasattr(module, "_hf_hook")


class SequenceEnds(NamedTuple):
    """Where the sequences of a call of `flash_forward` end.

    Attributes:
        queries, keys: (S + 1,) int32 on the device, 0 and the end of each.
        longest_query, longest_key: tokens of the longest.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int


def has_flash_attention(query: torch.Tensor) -> bool:
    """Whether `flash_forward` computes queries like `query` (…, D): NVIDIA's cards from Ampere on, 16 bits."""
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: SequenceEnds,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Causal attention of sequences in a row, the last query aligned with the last key.

    This is what `torch.nn.attention.varlen.varlen_attn` calls, whose backward pass needs the gathered keys kept.

    Returns:
        The output, of the shape (T, H, D) of `query`, and what `flash_backward` needs of this call.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *ends, 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=0,
    )[:4]  # fmt: skip


def flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    state: Sequence[torch.Tensor],
    ends: SequenceEnds,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; `state` is what `flash_forward` returned after its output."""
    sums, *random = state
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, sums, *ends, 0.0, True, *random,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=0,
    )  # fmt: skip


def fused_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm of `hidden` (…, D) in one kernel of a GPU, in the dtype of `hidden` and `weight` (D,).

    `torch.nn.functional.rms_norm` calls it, but returns float32 under autocast from torch 2.12 on.
    """
    return torch.ops.aten._fused_rms_norm(hidden, weight.shape, weight, epsilon)[0]
