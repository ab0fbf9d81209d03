"""What the targets share: the refusals, and our weights under the names of transformers' LLaVA classes.

Used by the modules of the targets (`llava.py`, `vipllava.py`) and by `folder.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from errors import UserError
from model.model import MMultiModal
from visual.CLIP_VIT import CLIPViT
from visual.SigLIP_VIT import SigLIPViT


@dataclass
class Stock:
    """Encoder and projector of a model as a stock class holds them.

    Attributes:
        config: the part of config.json without `text_config`.
        tensors: under the hub's names.
        feature_error: relative error (root mean square) of what the projector gets, from the conversion itself.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    feature_error: float = 0.0


class ExportTarget(NamedTuple):
    """A format of `export.py`.

    Attributes:
        check: raises UserError for a model that the format cannot hold.
        write: writes a model to an empty folder and returns the error of the conversion (see `Stock`). It also takes
            some pixels (C, 3, H, W), and may change the weights of the model.
        program: that reads the folder, a key of `stock_check.READERS`.
        bfloat16: whether the program computes in it on a CPU.
        packages: libraries that it needs, besides those of requirements.txt.
        quantised: value of --weights → `write` with such weights.
        quantised_packages: value of --weights → libraries that such weights need besides.
        photos_first: whether the program puts the photos of a question before its text.
    """

    check: Callable[[MMultiModal], None]
    write: Callable[[MMultiModal, torch.Tensor, Path], float]
    program: str = "transformers"
    bfloat16: bool = True
    packages: tuple[str, ...] = ()
    quantised: Mapping[str, Callable[[MMultiModal, torch.Tensor, Path], float]] = MappingProxyType({})
    quantised_packages: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    photos_first: bool = False


def check_parts(model: MMultiModal) -> None:
    """Raise UserError for an encoder, tiles or a projector that no LLaVA class has."""
    if not isinstance(model.encoder, SigLIPViT | CLIPViT):
        raise UserError(
            f"'visual.path' is an encoder of the kind {type(model.encoder).__name__}, and programs that read LLaVA "
            "folders know SigLIP and CLIP only: use --format onnx or openvino, train with one of these, or let "
            "programs ask serve.py"
        )
    check_tiles(model)
    model.feature_proj.llava_tensors()


def check_tiles(model: MMultiModal) -> None:
    """Raise UserError for a model with tiles."""
    if model.config.visual.tiles:
        raise UserError(
            f"'visual.tiles' is {model.config.visual.tiles}, and no stock class lays out tiles as we do: train with "
            "visual.tiles=0, or let programs ask serve.py"
        )


def strategy(model: MMultiModal) -> str:
    """Return LLaVA's name for the dropped rows: `default` drops the first row, `full` drops none."""
    return "default" if model.encoder.dropped else "full"


def merged_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Merge LoRA into the weights of `module`, in place; return its state under the library's names."""
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    state = module.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def vision_tensors(model: MMultiModal) -> dict[str, torch.Tensor]:
    """Return the encoder's weights, LoRA merged, under the hub's names."""
    return {f"vision_tower.vision_model.{name}": tensor for name, tensor in merged_tensors(model.encoder).items()}


def projector_tensors(model: MMultiModal) -> dict[str, torch.Tensor]:
    """Return the projector's weights under the hub's names."""
    return {f"multi_modal_projector.{name}": tensor for name, tensor in model.feature_proj.llava_tensors().items()}


def plain_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return a library config without paths of this machine, with the dtype under its old and new name."""
    settings = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        settings.pop(key, None)
    name = str(dtype).removeprefix("torch.")
    return settings | {"dtype": name, "torch_dtype": name}
