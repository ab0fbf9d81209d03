"""The one way a photo becomes pixels: `load_image` (any file → RGB) and `ImageTransform` (RGB → tensor).

Dataset, page, command line, evaluation and the check in `process_image.py` all use it, so a photo looks the same to
the encoder wherever it comes from.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from errors import UserError
from visual.photo import MAX_PIXELS, PHOTO_FORMATS, load_image

__all__ = ["MAX_PIXELS", "PHOTO_FORMATS", "ImageTransform", "load_image"]

PREPROCESSOR_FILE = "preprocessor_config.json"
LONGEST_ASPECT = 100  # long edge / short edge up to which CLIP's own way is taken: 34 MB a copy at 336 px

# transformers' AutoImageProcessor asks for torchvision in 5.17, and torchvision's resize differs from Pillow's
PROCESSORS = {
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "SiglipImageProcessorFast": SiglipImageProcessorPil,
    "SiglipImageProcessorPil": SiglipImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "CLIPImageProcessorFast": CLIPImageProcessorPil,
    "CLIPImageProcessorPil": CLIPImageProcessorPil,
    "CLIPFeatureExtractor": CLIPImageProcessorPil,
}


class ImageTransform:
    """RGB picture → `pixel_values`, by the checkpoint's own Hugging Face image processor.

    The processor is wrapped and not rewritten: it costs 9 ms for a 640 × 480 photo where a table look-up of our own
    costs 6 ms, beside 3 ms for the JPEG itself, and so equality with it cannot drift.
    """

    def __init__(self, processor: SiglipImageProcessorPil | CLIPImageProcessorPil) -> None:
        output = processor.crop_size if processor.do_center_crop else processor.size
        if not (processor.do_resize and output and output["height"] and output["width"]):
            raise UserError(f"gives photos no fixed height and width: do_resize {processor.do_resize}, size {output}")
        self.processor = processor
        self.size: tuple[int, int] = (output["height"], output["width"])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ImageTransform":
        """The transform that `preprocessor_config.json` in a checkpoint's folder describes.

        Raises:
            UserError: the file is missing, not JSON, of another kind of processor, or gives no fixed output size.
        """
        file = Path(folder) / PREPROCESSOR_FILE
        if not file.is_file():
            raise UserError(f"{file} not found: copy it from the vision checkpoint, it says how photos are resized")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON ({error}), fetch it again") from error
        if not isinstance(settings, dict):
            raise UserError(f"{file}: expected an object, found {type(settings).__name__}")
        kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
        if kind not in PROCESSORS:
            raise UserError(f"{file}: image processor {kind!r} is not supported, only {', '.join(PROCESSORS)}")
        try:
            return cls(PROCESSORS[kind](**settings))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: {error}") from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize, scale and normalise.

        Args:
            image: RGB, from `load_image`.

        Returns:
            (3, H, W) float32, H and W in pixels as in `size`.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture is {image.mode}, not RGB: pass it through load_image first")
        return self.processor(self._middle(image), return_tensors="pt")["pixel_values"][0]  # (3, H, W)

    def _middle(self, image: Image.Image) -> Image.Image:
        """The part of a very long picture that CLIP's centre crop keeps, at its resized size; others unchanged.

        CLIP resizes the short edge first and crops then: at 336 px, a strip of 20,000 × 10 pixels would grow to 0.7 GB
        a copy. Pillow rounds the box to float32, so fewer than one pixel in 100 differs, by one level of 255.
        """
        edge = (self.processor.size or {}).get("shortest_edge")
        short, long = sorted(image.size)
        if edge is None or long <= LONGEST_ASPECT * short:
            return image
        across = image.width > image.height
        crop = self.size[1] if across else self.size[0]
        kept = max(edge, crop)
        resized = int(edge * long / short)  # as the processor rounds
        start = (resized - crop) // 2 - (kept - crop) // 2  # the processor crops the kept part to the same pixels
        low, high = start * long / resized, (start + kept) * long / resized
        reach = 1 + math.ceil(3 * max(1, long / resized))  # no filter of Pillow's looks farther than 3 pixels
        first, last = max(0, int(low) - reach), min(long, math.ceil(high) + reach)
        low, high = low - first, high - first  # Pillow rounds these to float32, so they had better be small
        if across:
            return image.crop((first, 0, last, short)).resize(
                (kept, edge), self.processor.resample, box=(low, 0, high, short)
            )
        return image.crop((0, first, short, last)).resize(
            (edge, kept), self.processor.resample, box=(0, low, short, high)
        )

    def fingerprint(self) -> str:
        """16 hex digits that differ between transforms that give different pixels; stable over library versions."""
        processor = self.processor
        settings = [
            [processor.do_resize, dict(processor.size or {}), int(processor.resample)],
            [bool(processor.do_center_crop), dict(processor.crop_size or {})],
            [processor.do_rescale, processor.rescale_factor],
            [processor.do_normalize, list(processor.image_mean), list(processor.image_std)],
        ]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
