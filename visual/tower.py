"""Interface of all image encoders: rows of a crop, their grid and width, and the crop size.

`visual/encoder.py` loads towers; their classes are in the other files of this folder.

Shapes: C crops, H × W pixels, Dv width.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from errors import UserError
from visual_plan import Grid

Drop = Literal["first", "leading", "none"]
Feature = Literal["output", "last", "penultimate"]


class Tower(nn.Module):
    """Image encoder: crops → rows of features.

    Attributes:
        leading: rows in front of the patches in the library's output (class token, registers).
        width: Dv.
        size: (H, W) of a crop in pixels.
        patch_size: (height, width) of a patch in pixels.
        drop: rows that `forward` leaves out: `first`, row 0 (for SigLIP the top-left patch), `leading`, all rows in
            front of the patches, or `none`.
        feature: what `encode` returns: the tower's own output, or the hidden states of its last or last but one layer.
    """

    leading: int
    width: int
    size: tuple[int, int]
    patch_size: tuple[int, int]
    drop: Drop = "none"
    feature: Feature = "output"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Self, dict[str, Any]]:
        """Load the tower in a checkpoint folder; return it and its loading info for `errors.require_complete`."""
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` pixels → `(C, leading + patches, Dv)`: the library's own output, nothing dropped."""
        raise NotImplementedError

    def select(self, feature: Feature) -> None:
        """Set `feature`; layers behind it are removed.

        Raises:
            UserError: the tower has only its own output.
        """
        if feature != "output":
            raise UserError(
                f"'visual.feature' is {feature}, and only SigLIP and CLIP encoders give the states of a layer: set "
                "visual.feature=output"
            )

    @property
    def library_model(self) -> nn.Module:
        """The library's own model, whose layer names peft uses for an adapter; here the tower itself."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the input pixels."""
        return next(self.parameters()).dtype

    @property
    def dropped(self) -> int:
        """Number of rows that `forward` leaves out."""
        return self.dropped_by(self.drop)

    def dropped_by(self, drop: Drop) -> int:
        """Number of rows that another `drop` would leave out."""
        return {"none": 0, "first": 1, "leading": self.leading}[drop]

    @property
    def all_rows(self) -> int:
        """Number of rows of one crop in the layers, before any are left out."""
        return self.grid.rows + self.dropped

    @property
    def grid(self) -> Grid:
        """Grid of the rows that `forward` returns for one crop."""
        height, width = (pixels // patch for pixels, patch in zip(self.size, self.patch_size, strict=True))
        return Grid(height, width, self.leading - self.dropped)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` pixels as `visual.transform` makes them → `(C, grid.rows, Dv)`, patches row by row at the end.

        Raises:
            ValueError: crops of another size than the tower's.
        """
        height, width = pixels.shape[-2:]
        if (height, width) != self.size:
            raise ValueError(f"pictures are {height}×{width}, the encoder takes {self.size[0]}×{self.size[1]} px")
        return self.encode(pixels)[:, self.dropped :]


class ConfigTower(Tower):
    """Tower that is a transformers model of a fixed picture size; its config has width and sizes."""

    config: Any
    encoder: nn.Module  # transformers' own, with `layers`

    def select(self, feature: Feature) -> None:
        """As the parent's; the last layer is removed for `penultimate`."""
        if feature == "penultimate":
            del self.encoder.layers[-1]
            self.config.num_hidden_layers -= 1
        self.feature = feature

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def size(self) -> tuple[int, int]:
        return pair(self.config.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        return pair(self.config.patch_size)


def check_drop(drop: str) -> None:
    """Raise ValueError unless `drop` is a valid `Tower.drop`."""
    if drop not in get_args(Drop):
        raise ValueError(f"drop is {drop!r}, not one of {', '.join(get_args(Drop))}")


# tensors of a LLaVA model: those of its vision tower, in the names of all versions of transformers, and the others
STOCK_TOWER = {r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": ""}
STOCK_OTHERS = r"^((model\.)?(language_model|multi_modal_projector)\.|lm_head\.)"


def load_pretrained(
    model_class: Any, folder: Path, dtype: torch.dtype, unread: Collection[str] = (), **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a transformers model; return it and its loading info, without extra tensors that match `unread`.

    Args:
        unread: regular expressions for tensors of a published model that the tower does not use.
        settings: further arguments of `from_pretrained`.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would print a table of the `unread` tensors
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            key_mapping=STOCK_TOWER,
            ignore_mismatched_sizes=True,  # to list them with the others
            output_loading_info=True,
            **settings,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    known = (*unread, STOCK_OTHERS)
    left_over = {name for name in info["unexpected_keys"] if not any(re.search(names, name) for names in known)}
    return model, {**info, "unexpected_keys": left_over}


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a size in a config.json, where one number means a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
