"""All uses of unstable library interfaces: private names, deep module paths, renamed methods.

`tests/test_compat.py` tests each line; the job with the newest versions runs these tests. Two other places copy code
of a library class and depend on its attributes: `qwen/Mqwen.py::packed_states` (a decoder layer) and `qwen/lora.py`
(peft's LoRA layer). Their tests compare both with the library.
"""

import copy
from collections.abc import Iterable, Mapping

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
    "SiglipImageProcessorPil",
    "ViTImageProcessorPil",
    "cache_prefix",
    "fp16_pack",
    "fp16_product",
    "fp16_unpack",
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
    """Whether torch has FBGEMM's products with fp16 weights: on x86 CPUs."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def fp16_pack(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.ScriptObject:
    """Pack float32 weights (O, I) as fp16 for `fp16_product`."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def fp16_product(x: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    """(…, I) → (…, O), both float32; without a gradient."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


def fp16_unpack(packed: torch.ScriptObject) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rounded weights in float32, and the bias."""
    return torch.ops.quantized.linear_unpack_fp16(packed)
