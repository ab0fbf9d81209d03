"""Conversion of photos and texts to model inputs, separate from the network for use in worker processes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from qwen.chat import ChatFormat
from visual.photo import photo_size
from visual.region import Region
from visual.transform import ImageTransform
from visual_plan import VisualPlan


@dataclass(frozen=True)
class Processor:
    """Tokenizer, image transform and prompt format of one model; can be pickled.

    Attributes:
        tiles: most tiles of a photo (`visual.tiles`); 0: only the whole photo.
    """

    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    chat: ChatFormat
    tiles: int = 0

    def plan(self, width: int, height: int) -> VisualPlan:
        """Return the plan of a photo of `width` × `height` pixels."""
        if self.tiles == 0:
            return self.chat.plan
        return VisualPlan(self.chat.plan.crop_tokens, *self.transform.tiles(width, height, self.tiles))

    def plan_of_file(self, photo: str | Path | Region) -> VisualPlan:
        """Return the plan of a photo or region in a file; its size is read only if there are tiles, as `photo_size`."""
        return self.plan(*(photo_size(photo) if self.tiles else (0, 0)))

    def pixels(self, image: Image.Image, plan: VisualPlan) -> torch.Tensor:
        """An RGB picture → `(crops, 3, H, W)`: the whole photo, then its tiles row by row."""
        return self.transform.crops(image, plan.tile_rows, plan.tile_columns)
