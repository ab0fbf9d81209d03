"""Pictures of heatmaps: the photo in gray with the map in colour over it. Called by `predict.py`."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from answering.heatmap import Heatmap

LONGEST_PX = 768  # of a drawn photo
GAP_PX = 8
# Colours of a map from 0 to its largest value; a photo in gray has none of them, and their brightness rises.
COLOURS = np.array([(90, 0, 120), (200, 30, 90), (250, 120, 20), (255, 230, 90)], dtype=float)
STRONGEST = 0.85  # opacity at the largest value
HATCH_PX = 8  # distance of the lines where the model sees nothing


def draw_heatmap(heatmap: Heatmap, image: Image.Image, largest: float | None = None) -> Image.Image:
    """Draw a map over its upright photo; what the model never sees is hatched.

    Args:
        image: of any size in the photo's proportions, from `visual.photo.load_image`.
        largest: value that gets the strongest colour; None: the largest of the map.
    """
    picture = image.convert("RGB")
    picture.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
    largest = largest or float(np.nanmax(heatmap.values)) or 1.0
    strength = Image.fromarray(np.nan_to_num(heatmap.values / largest).astype(np.float32))
    strength = np.asarray(strength.resize(picture.size, Image.Resampling.BILINEAR))  # (h, w)
    hidden = Image.fromarray(np.isnan(heatmap.values)).resize(picture.size, Image.Resampling.NEAREST)
    gray = np.asarray(picture.convert("L"), dtype=float)[..., None].repeat(3, axis=2)
    stops = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(strength, stops, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    drawn = gray + (colour - gray) * (STRONGEST * strength.clip(0, 1))[..., None]
    row, column = np.indices(strength.shape)
    line = (row + column) % HATCH_PX < 2
    drawn[np.asarray(hidden) & line] = 255
    drawn[np.asarray(hidden) & ~line] = 90
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def draw_heatmaps(heatmaps: Sequence[Heatmap], images: Sequence[Image.Image]) -> Image.Image:
    """Draw the maps of a dialogue side by side with one scale of colours; arguments as in `draw_heatmap`."""
    largest = max(float(np.nanmax(heatmap.values)) for heatmap in heatmaps)
    drawn = [draw_heatmap(heatmap, image, largest) for heatmap, image in zip(heatmaps, images, strict=True)]
    width = sum(picture.width + GAP_PX for picture in drawn) - GAP_PX
    page = Image.new("RGB", (width, max(picture.height for picture in drawn)), "white")
    left = 0
    for picture in drawn:
        page.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return page
