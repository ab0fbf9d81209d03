"""Table of trained parts: weights, learning rate and checkpoint file of each.

`MMultiModal.parts` is built from it. Freezing, optimizer, checkpoint, log and estimates loop over these parts and name
none of them. A new part is therefore one function and one line in `PARTS`, with settings under `train.parts` in the
config.
"""

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from compat import use_lora_layer
from config import Config, LlmSettings, Lora, PartSettings, VisionSettings
from errors import UserError, shortened
from qwen.lora import LoraLinear
from visual.tower import Tower

PROJECTOR_FILE = "feature_proj.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
LLM_FILE = "llm.safetensors"
VISION_FILE = "vision.safetensors"
VISION_ADAPTER_FILE = "vision_adapter/adapter_model.safetensors"


class Network(Protocol):
    """Attributes of `model.model.MMultiModal` that the parts are built from."""

    config: Config
    encoder: Tower
    feature_proj: nn.Module
    LLM: Any


@dataclass
class Part:
    """One trained part.

    Attributes:
        name: in the log (`<name>_lr`) and in messages.
        lr: peak learning rate; 0: unchanged, but saved in the checkpoint.
        parameters: by their names in `file`.
        file: file in the checkpoint folder.
        lora: peft's settings of an adapter, saved beside the file; None for other parts.
    """

    name: str
    lr: float
    parameters: dict[str, nn.Parameter]
    file: str
    lora: LoraConfig | None = None


def projector_part(model: Network, settings: PartSettings) -> list[Part]:
    """Return the projector part; all its weights are trained."""
    return [Part("projector", settings.lr, dict(model.feature_proj.named_parameters()), PROJECTOR_FILE)]


def llm_parts(model: Network, settings: LlmSettings) -> list[Part]:
    """Return the parts of the language model: LoRA (`lora`) or all its weights (`full`).

    All weights of `layers` are trained in both modes. The other layers get LoRA with `lora` and are frozen with `full`.

    Raises:
        UserError: a layer or a target module that does not exist, quantised weights in a layer to train, or no layer
            left for LoRA.
    """
    if settings.mode == "frozen":
        return []
    lora, names = model.config.llm.lora, dict(model.LLM.named_parameters())
    count = len(model.LLM.model.layers)
    wrong = [layer for layer in settings.layers or () if not 0 <= layer < count]
    if wrong:
        raise UserError(
            f"'train.parts.llm.layers': there is no layer {wrong[0]}, the language model has layers 0 to {count - 1}"
        )
    whole = [name for name in names if settings.layers is None or _layer_of(name) in settings.layers]
    if settings.mode == "lora" and settings.layers is None:
        whole = []
    if whole and model.config.llm.quantization != "none":
        raise UserError(
            f"'llm.quantization' is {model.config.llm.quantization}, and weights in so few bits cannot be trained: set "
            "train.parts.llm.mode=lora and train.parts.llm.layers=null, or llm.quantization=none"
        )
    parts = []
    if whole:
        parts.append(Part("llm", settings.lr, {name: names[name] for name in whole}, LLM_FILE))
    if settings.mode == "lora":
        others = [layer for layer in range(count) if layer not in (settings.layers or ())]
        if not others:  # to peft, an empty list means all layers
            raise UserError(
                "'train.parts.llm.layers' names every layer, and no layer is left for LoRA: set "
                "train.parts.llm.mode=full, or name fewer layers"
            )
        arguments = {} if settings.layers is None else {"layers_to_transform": others, "layers_pattern": "layers"}
        adapter = _lora_config(
            lora,
            _linear_names(model.LLM, lora.target_modules, "llm.lora.target_modules"),
            task_type="CAUSAL_LM",
            **arguments,
        )
        if model.config.llm.quantization == "none":  # peft has its own LoRA layers for quantised layers
            use_lora_layer(adapter, LoraLinear, nn.Linear)
        with warnings.catch_warnings():  # peft reads an attribute that transformers renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model.LLM = get_peft_model(model.LLM, adapter)
        parts.append(Part("lora", settings.lr, _adapter_parameters(model.LLM), ADAPTER_FILE, adapter))
    return parts


def vision_parts(model: Network, settings: VisionSettings) -> list[Part]:
    """Return the part of the encoder: LoRA on its linear layers (`lora`), or all its weights (`full`).

    To peft, a name means every layer whose name ends so: timm's `proj` is in the attention and the convolution that
    makes patches. Checkpoints have LoRA on both, so this stays as it is.
    """
    if settings.mode == "frozen":
        return []
    if settings.mode == "full":
        return [Part("vision", settings.lr, dict(model.encoder.named_parameters()), VISION_FILE)]
    lora, encoder = model.config.visual.lora, model.encoder.library_model
    adapter = _lora_config(lora, _linear_names(encoder, lora.target_modules, "visual.lora.target_modules"))
    use_lora_layer(adapter, LoraLinear, nn.Linear)
    inject_adapter_in_model(adapter, encoder)
    # peft saves an adapter under the names of its wrapper
    parameters = _adapter_parameters(encoder, "base_model.model.")
    return [Part("vision_lora", settings.lr, parameters, VISION_ADAPTER_FILE, adapter)]


# key under `train.parts` → what it trains
PARTS: dict[str, Callable[[Any, Any], list[Part]]] = {
    "projector": projector_part,
    "llm": llm_parts,
    "vision": vision_parts,
}


def check_part_name(key: str, where: str = "") -> None:
    """Raise UserError unless `key` is in `PARTS`; the message opens with `where` and names the nearest part."""
    if key not in PARTS:
        near = difflib.get_close_matches(key, PARTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"parts are {', '.join(PARTS)}"
        raise UserError(f"{where}'train.parts.{shortened(key)}' is not a part that can be trained, {hint}")


def make_parts(model: Network) -> list[Part]:
    """Build the parts of a frozen model and enable gradients where the learning rate is above 0.

    Trained weights are kept in float32, because bf16 would lose small steps. So is LoRA with a learning rate of 0: the
    next checkpoint has it unchanged. Whole weights with 0 get the dtype of frozen ones, and that checkpoint has it too.

    Raises:
        UserError: an unknown part, or an error of its function in `PARTS`.
    """
    parts: list[Part] = []
    for key, settings in model.config.train.parts:
        check_part_name(key)
        parts += PARTS[key](model, settings)
    for part in parts:
        for parameter in part.parameters.values():
            if (part.lr > 0 or part.lora) and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(part.lr > 0)
    return parts


def _layer_of(name: str) -> int | None:
    """Return the layer number in `model.layers.3.mlp.up_proj.weight`; None without a number."""
    _, found, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if found else None


def _linear_names(module: nn.Module, wanted: list[str] | None, key: str) -> list[str]:
    """Return `wanted`, or all names of linear layers in `module`; UserError for an unknown name."""
    names = {name.rpartition(".")[2] for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    unknown = sorted(set(wanted or ()) - names)
    if unknown:
        raise UserError(
            f"'{key}': no linear layer is called {', '.join(unknown)}; there are {', '.join(sorted(names))}"
        )
    return sorted(names) if wanted is None else wanted


def _lora_config(lora: Lora, target_modules: list[str], **arguments: Any) -> LoraConfig:
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target_modules, **arguments
    )


def _adapter_parameters(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    return {
        prefix + name.replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if "lora_" in name
    }
