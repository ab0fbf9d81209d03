"""Image processors that transformers has no Pillow class for. Used by `visual/transform.py`.

Both have the interface of transformers' processors and need no torchvision.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from compat import CLIPImageProcessorPil, ViTImageProcessorPil

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class DINOv3ImageProcessor(ViTImageProcessorPil):
    """DINOv3's processor: resizes in float32, because Pillow would round to 8 bit before scaling.

    transformers scales before it resizes. Both are linear, so the order changes only the last float32 digit.

    Raises:
        ValueError: a filter other than bilinear and bicubic, the only ones in torch.
    """

    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.resample not in FILTERS:
            raise ValueError(f"resample is {self.resample}, only {[int(number) for number in FILTERS]} are read")

    def resize(self, image: np.ndarray, size: Any, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """(3, h, w) uint8 → (3, H, W) float32, still 0 to 255."""
        if not (size.height and size.width):
            raise ValueError(f"size has no height and width: {size}")
        pixels = torch.from_numpy(np.ascontiguousarray(image)).float().unsqueeze(0)
        shape = (size.height, size.width)
        return torch.nn.functional.interpolate(pixels, shape, mode=FILTERS[resample], antialias=True)[0].numpy()


class TimmImageProcessor(CLIPImageProcessorPil):
    """timm's transform for evaluation, from `pretrained_cfg` in its config.json.

    `crop_pct` is the edge after cropping divided by the edge before. `crop_mode` `center` keeps the aspect ratio and
    cuts the margins off; `squash` changes the aspect ratio.

    Raises:
        ValueError: a setting is missing or not supported.
    """

    def __init__(
        self,
        *,
        input_size: list[int],
        interpolation: str,
        crop_pct: float,
        crop_mode: str,
        mean: list[float],
        std: list[float],
        **unused: Any,
    ) -> None:
        _, height, width = input_size
        before = [math.floor(edge / crop_pct) for edge in (height, width)]
        filters = {name.lower(): number for name, number in Image.Resampling.__members__.items()}
        if interpolation not in filters:
            raise ValueError(f"interpolation is {interpolation!r}, only {', '.join(filters)} are read")
        if crop_mode == "squash":
            size = {"height": before[0], "width": before[1]}
        elif crop_mode == "center" and height == width:
            size = {"shortest_edge": before[0]}
        else:
            raise ValueError(
                f"crop_mode {crop_mode!r} with {height}×{width} px is not read, only 'squash', or 'center' with squares"
            )
        super().__init__(
            size=size,
            resample=filters[interpolation],
            crop_size={"height": height, "width": width},
            image_mean=list(mean),
            image_std=list(std),
        )

    def center_crop(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:
        """(3, h, w) → (3, H, W); half of an odd margin is rounded to even; transformers rounds it down."""
        top, left = round((image.shape[-2] - size.height) / 2), round((image.shape[-1] - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]
