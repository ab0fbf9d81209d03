"""Photo to pixels: `load_image` (any file → RGB) and `ImageTransform` (RGB → tensor).

Dataset, page, command line, evaluation and the check in `process_image.py` all use it, so a photo always gives the same
pixels.
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from compat import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil
from errors import UserError
from visual.photo import MAX_PIXELS, PHOTO_FORMATS, load_image
from visual.processors import DINOv3ImageProcessor, TimmImageProcessor

__all__ = ["MAX_PIXELS", "PHOTO_FORMATS", "ImageTransform", "load_image"]

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # holds the same for a whole model that transformers 5 saved
LONGEST_ASPECT = 100  # largest long edge / short edge for a center crop: 34 MB a copy at 336 px

PROCESSORS = {
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "SiglipImageProcessorFast": SiglipImageProcessorPil,
    "SiglipImageProcessorPil": SiglipImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "CLIPImageProcessorFast": CLIPImageProcessorPil,
    "CLIPImageProcessorPil": CLIPImageProcessorPil,
    "CLIPFeatureExtractor": CLIPImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "ViTImageProcessorFast": ViTImageProcessorPil,
    "ViTImageProcessorPil": ViTImageProcessorPil,
    "ViTFeatureExtractor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,  # DINOv2's
    "BitImageProcessorFast": BitImageProcessorPil,
    "BitImageProcessorPil": BitImageProcessorPil,
    "DINOv3ViTImageProcessor": DINOv3ImageProcessor,
    "DINOv3ViTImageProcessorFast": DINOv3ImageProcessor,
}


class ImageTransform:
    """RGB picture → `pixel_values`, by the checkpoint's own Hugging Face image processor.

    It wraps the processor, so its pixels always equal the processor's. A 640 × 480 photo takes 9 ms; a table look-up of
    our own would take 6 ms, and decoding the JPEG takes 3 ms.
    """

    def __init__(self, processor: Any) -> None:
        output = processor.crop_size if processor.do_center_crop else processor.size
        if not (processor.do_resize and output and output["height"] and output["width"]):
            raise UserError(f"gives photos no fixed height and width: do_resize {processor.do_resize}, size {output}")
        self.processor = processor
        self.size: tuple[int, int] = (output["height"], output["width"])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ImageTransform":
        """Load the transform of a checkpoint folder from `preprocessor_config.json`, or from timm's `config.json`.

        Raises:
            UserError: the file is missing, not JSON, has an unsupported processor, or gives no fixed output size.
        """
        file, whole = Path(folder) / PREPROCESSOR_FILE, Path(folder) / PROCESSOR_FILE
        if file.is_file() or whole.is_file():
            file = file if file.is_file() else whole
            settings = _read_object(file)
            settings = settings.get("image_processor", settings)
            kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
            if kind not in PROCESSORS:
                raise UserError(f"{file}: image processor {kind!r} is not supported, only {', '.join(PROCESSORS)}")
            make = PROCESSORS[kind]
        else:
            model = Path(folder) / "config.json"
            settings = _read_object(model).get("pretrained_cfg") if model.is_file() else None
            if settings is None:
                raise UserError(f"{file} not found: copy it from the vision checkpoint, it says how photos are resized")
            file, make = model, TimmImageProcessor
        try:
            return cls(make(**settings))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: {error}") from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize, scale and normalise.

        Args:
            image: RGB, from `load_image`.

        Returns:
            (3, H, W) float32, H and W in pixels as in `size`.

        Raises:
            UserError: the processor uses a center crop, and the photo's aspect ratio is above `LONGEST_ASPECT`.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture is {image.mode}, not RGB: pass it through load_image first")
        self._check_shape(image)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]  # (3, H, W)

    def _check_shape(self, image: Image.Image) -> None:
        # these processors resize the short edge and then crop: at 336 px, a strip of 20,000 × 10 pixels would grow to
        # 0.7 GB a copy, and cropping would keep 0.05 % of it
        short, long = sorted(image.size)
        cropping = self.processor.do_center_crop and (self.processor.size or {}).get("shortest_edge")
        if cropping and long > LONGEST_ASPECT * short:
            longer = "longer than wide" if image.height > image.width else "wider than high"
            raise UserError(
                f"photo is {image.width}×{image.height}, more than {LONGEST_ASPECT} times {longer}, and the encoder "
                "sees only its middle: crop it"
            )

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of a photo of `width` × `height` pixels in its crop: left, top, right, bottom in pixels.

        It is the whole photo, except for processors that crop the middle; there, to half a pixel of the resized photo.
        """
        if not self.processor.do_center_crop:
            return 0.0, 0.0, float(width), float(height)
        size = self.processor.size
        scale = (size.get("shortest_edge") or 0) / min(width, height)
        resized = (width * scale, height * scale) if scale else (size["width"], size["height"])
        wide, high = (min(edge / own, 1) for edge, own in zip((self.size[1], self.size[0]), resized, strict=True))
        left, top = (1 - wide) / 2 * width, (1 - high) / 2 * height
        return left, top, width - left, height - top

    def tiles(self, width: int, height: int, most: int) -> tuple[int, int]:
        """Return (rows, columns): the grid of at most `most` tiles with the aspect ratio nearest to the photo's.

        Distance is the logarithm of the ratio of both aspect ratios. Among equally near grids, a larger one is used
        only if the photo has at least half of its pixels, because enlarging adds no detail (as in InternVL 1.5,
        arXiv 2404.16821).

        Args:
            width, height: of the photo in pixels.

        Returns:
            (0, 0) if one crop is enough: the photo is not larger than a crop, or one tile is nearest to it.
        """
        if width <= self.size[1] and height <= self.size[0]:
            return 0, 0
        tile_height, tile_width = self.size

        def order(grid: tuple[int, int]) -> tuple[Fraction, int]:
            rows, columns = grid
            # exact, so ties do not depend on rounding; the logarithm has the same order
            ratio = Fraction(width * rows * tile_height, height * columns * tile_width)
            enough = 2 * width * height >= rows * columns * tile_height * tile_width
            return max(ratio, 1 / ratio), -rows * columns if enough else rows * columns

        grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        rows, columns = min(grids, key=order, default=(1, 1))
        return (0, 0) if rows * columns == 1 else (rows, columns)

    def crops(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        """Return the whole photo, then its tiles row by row, each as one crop.

        The photo is resized to `columns` × `rows` crops with the processor's own filter and cut; the tiles are scaled
        and normalised.

        Args:
            image: RGB, from `load_image`.
            rows, columns: from `tiles`; 0 and 0: only the whole photo.

        Returns:
            (1 + rows * columns, 3, H, W) float32.

        Raises:
            UserError: as `__call__`.
        """
        whole = self(image).unsqueeze(0)
        if rows * columns == 0:
            return whole
        height, width = self.size
        canvas = image.resize((columns * width, rows * height), self.processor.resample)
        corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + width, top + height)) for left, top in corners]
        # DINOv2's processor would enlarge a tile and crop it again
        pixels = self.processor(tiles, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        return torch.cat([whole, pixels])

    def fingerprint(self) -> str:
        """Hash of the settings that affect the pixels, 16 hex digits; stable over library versions."""
        processor = self.processor
        settings: list[Any] = [
            [processor.do_resize, dict(processor.size or {}), int(processor.resample)],
            [bool(processor.do_center_crop), dict(processor.crop_size or {})],
            [processor.do_rescale, processor.rescale_factor],
            [processor.do_normalize, list(processor.image_mean), list(processor.image_std)],
        ]
        # these classes give other pixels than transformers' classes with the same settings
        if isinstance(processor, DINOv3ImageProcessor | TimmImageProcessor):
            settings.append(type(processor).__name__)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}), fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object, found {type(content).__name__}")
    return content
