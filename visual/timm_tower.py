"""Vision transformers of the timm library (EVA-02, EVA-CLIP, DINOv3 …). Loaded by `visual/encoder.py`."""

import importlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import nn

from errors import UserError, shortened
from visual.tower import Tower

WEIGHTS = "model.safetensors"


class TimmViT(Tower):
    """A vision transformer of timm; gives its `forward_features`, after the final layer norm if it has one.

    Models that average the patches apply their norm after the average (`fc_norm`), so their rows are not normalised.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.leading = model.num_prefix_tokens
        self.width = model.num_features
        self.size = model.patch_embed.img_size
        self.patch_size = model.patch_embed.patch_size

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Self, dict[str, Any]]:
        """Load the tower from a hub folder: `config.json` with `architecture`, and `model.safetensors`.

        Raises:
            UserError: timm is missing or lacks the model, the weights have another format, or the model is not a vision
                transformer.
        """
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"'visual.path': {folder} has no {WEIGHTS}, the only form in which timm's models are read")
        model = build(settings, folder)
        # the classifier is skipped, because the model has none; its name depends on the architecture
        head = tuple(f"{name}." for name in _names(settings["pretrained_cfg"].get("classifier")))
        tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if not name.startswith(head)}
        wanted = model.state_dict()
        mismatched = {
            (name, tuple(tensors[name].shape), tuple(wanted[name].shape))
            for name in tensors.keys() & wanted.keys()
            if tensors[name].shape != wanted[name].shape
        }
        info = {
            "missing_keys": wanted.keys() - tensors.keys(),
            "unexpected_keys": tensors.keys() - wanted.keys(),
            "mismatched_keys": mismatched,
        }
        if not any(info.values()):
            model.load_state_dict(tensors)
        return cls(model.to(dtype)), info

    @property
    def library_model(self) -> nn.Module:
        return self.model

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` → `(C, leading + N, Dv)`."""
        return self.model.forward_features(pixels)


def build(settings: dict[str, Any], folder: Path) -> Any:
    """Build the model of timm's config.json, without a classifier and with random weights.

    Raises:
        UserError: as `TimmViT.load`.
    """
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises RuntimeError
        raise UserError(
            f"'visual.path': {folder} is a model of timm, which cannot be imported ({error}): run `pip install timm`, "
            "with the torchvision that belongs to this torch"
        ) from error
    name = settings["architecture"]
    if not timm.is_model(name):
        raise UserError(f"'visual.path': timm {timm.__version__} knows no '{shortened(name)}': install a newer timm")
    model = timm.create_model(name, pretrained=False, **(settings.get("model_args", {}) | {"num_classes": 0}))
    if not isinstance(model, (timm.models.VisionTransformer, timm.models.Eva)):
        raise UserError(
            f"'visual.path': '{name}' in {folder} is not a plain vision transformer, so it has no patch rows"
        )
    size = tuple(settings["pretrained_cfg"]["input_size"][1:])
    if model.patch_embed.img_size != size:
        raise UserError(
            f"'visual.path': config.json in {folder} makes pictures of {size[0]}×{size[1]} px, its architecture "
            f"'{name}' takes {model.patch_embed.img_size[0]}×{model.patch_embed.img_size[1]}"
        )
    return model


def _names(names: str | list[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else names
