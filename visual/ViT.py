"""ViT, DINOv2 and DINOv3: transformers' models with the last hidden state after the final layer norm.

Loaded by `visual/encoder.py`.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel

from visual.tower import Tower, load_pretrained, pair
from visual.transform import ImageTransform


class LibraryTower(Tower):
    """Tower that wraps a transformers model instead of subclassing it.

    transformers 5 renames the tensors of older files by the model's class name, so a subclass with another name would
    not find them.
    """

    model_class: ClassVar[Any]
    settings: ClassVar[dict[str, Any]] = {}
    unread: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.width = self.config.hidden_size
        self.patch_size = pair(self.config.patch_size)
        self.size = size

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Self, dict[str, Any]]:
        model, info = load_pretrained(cls.model_class, folder, dtype, cls.unread, **cls.settings)
        return cls(model, cls.picture_size(model.config, folder)), info

    @property
    def library_model(self) -> nn.Module:
        return self.model

    @classmethod
    def picture_size(cls, config: Any, folder: Path) -> tuple[int, int]:
        """(H, W) in pixels; for models that accept any size, the output size of `preprocessor_config.json`.

        facebook/dinov2-base has positions for 518 px, but its published crop size is 224 px.
        """
        return ImageTransform.from_folder(folder).size

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` → `(C, leading + N, Dv)`, after the final layer norm."""
        return self.model(pixels).last_hidden_state


class ViT(LibraryTower):
    """ViT and DINO (`model_type: vit`), with a class token in front; without pooler and classifier."""

    leading = 1
    model_class = ViTModel
    settings: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    # heads of ViTModel, ViTForImageClassification and ViTForMaskedImageModeling
    unread = (
        r"^(vit\.)?pooler\.dense\.(weight|bias)$",
        r"^classifier\.(weight|bias)$",
        r"^decoder\.0\.(weight|bias)$",
        r"^(vit\.)?embeddings\.mask_token$",
    )

    @classmethod
    def picture_size(cls, config: Any, folder: Path) -> tuple[int, int]:
        """(H, W) in pixels, from its position embeddings."""
        return pair(config.image_size)


class DINOv2(LibraryTower):
    """DINOv2, with a class token in front."""

    leading = 1
    model_class = Dinov2Model
    unread = (r"^classifier\.(weight|bias)$",)


class DINOv2WithRegisters(LibraryTower):
    """DINOv2 with a class token and registers in front."""

    model_class = Dinov2WithRegistersModel
    unread = (r"^classifier\.(weight|bias)$",)

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__(model, size)
        self.leading = 1 + self.config.num_register_tokens


class DINOv3(DINOv2WithRegisters):
    """DINOv3's ViT, with a class token and registers in front; published without a head."""

    model_class = DINOv3ViTModel
    unread = ()
