"""The table of trained parts: what learns, at which rate, and in which file of a checkpoint it is kept.

`MMultiModal.parts` is made from it. Freezing, optimizer, checkpoint, log and estimates loop over these parts and name
none of them, so another thing to train is one function and one line in `PARTS`, and its settings stand under
`train.parts` in the config.
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
    """What of a model its parts are made of; `model.model.MMultiModal`, which holds them."""

    config: Config
    encoder: Tower
    feature_proj: nn.Module
    LLM: Any


@dataclass
class Part:
    """Something that is trained.

    Attributes:
        name: in the log (`<name>_lr`) and in messages.
        lr: peak learning rate; 0: left as it is, but kept in the checkpoint.
        parameters: by their names in `file`.
        file: of the checkpoint folder.
        lora: settings in peft's own form, kept beside the file; None: the parameters are no adapter.
    """

    name: str
    lr: float
    parameters: dict[str, nn.Parameter]
    file: str
    lora: LoraConfig | None = None


def projector_part(model: Network, settings: PartSettings) -> list[Part]:
    """The projector, always whole."""
    return [Part("projector", settings.lr, dict(model.feature_proj.named_parameters()), PROJECTOR_FILE)]


def llm_parts(model: Network, settings: LlmSettings) -> list[Part]:
    """LoRA on the language model (`lora`), or all its weights (`full`); `layers` alone are trained whole in both.

    With `lora` and `layers`, these layers are trained whole and the others get LoRA.

    Raises:
        UserError: a layer or a target module that does not exist, quantised weights that would be trained, or no layer
            that is left for LoRA.
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
        if model.config.llm.quantization == "none":  # quantised layers have LoRA layers of their own in peft
            use_lora_layer(adapter, LoraLinear, nn.Linear)
        with warnings.catch_warnings():  # peft reads what transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model.LLM = get_peft_model(model.LLM, adapter)
        parts.append(Part("lora", settings.lr, _adapter_parameters(model.LLM), ADAPTER_FILE, adapter))
    return parts


def vision_parts(model: Network, settings: VisionSettings) -> list[Part]:
    """LoRA on the linear layers of the encoder (`lora`), or all its weights (`full`)."""
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


def make_parts(model: Network) -> list[Part]:
    """The parts of a model whose weights are all frozen; turns the gradients of those with a learning rate on.

    What is trained is kept in float32: a small step would be lost in bf16.

    Raises:
        UserError: a part that `PARTS` does not have, or what its function raises.
    """
    parts: list[Part] = []
    for key, settings in model.config.train.parts:
        if key not in PARTS:
            near = difflib.get_close_matches(key, PARTS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"parts are {', '.join(PARTS)}"
            raise UserError(f"'train.parts.{shortened(key)}' is not a part that can be trained, {hint}")
        parts += PARTS[key](model, settings)
    for part in parts:
        for parameter in part.parameters.values():
            if part.lr > 0 and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(part.lr > 0)
    return parts


def _layer_of(name: str) -> int | None:
    """The number in `model.layers.3.mlp.up_proj.weight`."""
    _, found, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if found else None


def _linear_names(module: nn.Module, wanted: list[str] | None, key: str) -> list[str]:
    """`wanted`, or all names of linear layers in `module`; UserError for one that it does not have."""
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
