"""The one place that uses what libraries do not promise to keep: private names, deep module paths, renamed methods.

`tests/test_compat.py` has a test for each line here, which the job with the newest versions runs. Two places outside
rely on how a class of a library is built, because they are that class's own code: `qwen/Mqwen.py::packed_states`
(attributes of a decoder layer) and `qwen/lora.py` (attributes of peft's LoRA layer); their tests compare both with the
library.
"""

from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import Cache, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

# transformers' AutoImageProcessor asks for torchvision in 5.17, and torchvision's resize differs from Pillow's
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

__all__ = [
    "BitImageProcessorPil",
    "CLIPImageProcessorPil",
    "SiglipImageProcessorPil",
    "ViTImageProcessorPil",
    "crop_cache",
    "onednn_has_bf16",
    "register_weight_names",
    "send_no_gradients_of",
    "set_activation_checkpointing",
    "use_lora_layer",
]


def set_activation_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Compute the layers' activations again in the backward pass, or keep them from the forward pass."""
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
    """Tell transformers' loader how a checkpoint calls the tensors of a model class.

    Args:
        class_name: of the model that is loaded.
        renamed: pattern in the checkpoint → name in the model, in the order in which they are applied.
        split: fused matrix → the matrices that its rows are, in equal parts.
    """
    rules: list[WeightRenaming | WeightConverter] = [WeightRenaming(old, new) for old, new in renamed.items()]
    rules += [
        WeightConverter(source_patterns=old, target_patterns=list(news), operations=[Chunk(dim=0)])
        for old, news in (split or {}).items()
    ]
    register_checkpoint_conversion_mapping(class_name, rules, overwrite=True)


def crop_cache(cache: Cache, tokens: int) -> None:
    """Keep the first `tokens` tokens of a cache."""
    surplus = cache.get_seq_length() - tokens
    if surplus > 0:
        cache.crop(-surplus)  # a negative count removes so many, in 5.17 as in 5.23


def use_lora_layer(settings: LoraConfig, layer: type[torch.nn.Module], base: type[torch.nn.Module]) -> None:
    """Let peft put `layer` around each module of the type `base`, in place of its own LoRA layer."""
    settings._register_custom_module({base: layer})


def send_no_gradients_of(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Leave parameters and buffers out of what torch's wrapper for several processes sends."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def onednn_has_bf16() -> bool:
    """Whether oneDNN may use instructions with which it computes in bf16; see `model.precision.cpu_has_bf16`."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
