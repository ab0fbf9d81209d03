"""A part of a photo, shown to the model as a photo of its own.

Torch is not imported, as in `photo.py`, whose functions take a `Region` in place of a photo.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from errors import UserError, shortened

# Left, top, right and bottom edge; `pixel_box` says in which unit. Right and bottom edge are not part of it.
Box = tuple[float, float, float, float]
FORM = 'x0,y0,x1,y1 in pixels of the upright photo, or as fractions of it with a point ("0.25,0.0,0.5,1.0")'


class Region(NamedTuple):
    """The part of `photo` inside `box`."""

    photo: str | Path | BinaryIO | Image.Image
    box: Box


def parse_box(text: str) -> Box:
    """Read a box from a command line; errors as `checked_box`."""
    try:
        left, top, right, bottom = (
            float(part) if "." in part or "e-" in part else int(part) for part in text.split(",")
        )
    except ValueError as error:
        raise UserError(f"the box {shortened(repr(text))} is not {FORM}") from error
    return checked_box([left, top, right, bottom])


def checked_box(value: Any) -> Box:
    """Return a box from JSON.

    Raises:
        UserError: it is not a list of four numbers, it is empty, an edge is negative, or pixels are not whole.
    """
    numbers = list(value) if isinstance(value, list | tuple) else []
    # a bool is an int as well; integers of any length are legal in JSON
    sound = [type(n) in (int, float) and abs(n) < 2**31 for n in numbers]  # false for nan
    if len(sound) != 4 or not all(sound):
        raise UserError(f"the box {shortened(repr(value))} is not {FORM}")
    left, top, right, bottom = numbers
    if right <= left or bottom <= top:
        raise UserError(f"the box {_shown(numbers)} is empty: x1 must be larger than x0, and y1 larger than y0")
    if left < 0 or top < 0:
        raise UserError(f"the box {_shown(numbers)} begins outside the photo: x0 and y0 must be 0 or more")
    if max(numbers) > 1 and any(number % 1 for number in numbers):
        raise UserError(f"the box {_shown(numbers)} is neither whole pixels nor fractions up to 1: it must be {FORM}")
    return left, top, right, bottom


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box in whole pixels of a photo of `width` × `height` pixels, enlarged to whole pixels, at least one.

    The numbers are fractions of width and height if none is above 1 and one was written with a point (a float).

    Raises:
        UserError: as `checked_box`, or the box ends outside the photo.
    """
    edges = checked_box(box)
    if max(edges) <= 1 and any(isinstance(edge, float) for edge in edges):
        scale = (width, height, width, height)
        # rounded, because 0.07 * 100 is a little more than 7
        edges = tuple(round(edge * length, 6) for edge, length in zip(edges, scale, strict=True))
    left, top, right, bottom = edges
    if right > width or bottom > height:
        raise UserError(f"the box {_shown(box)} ends outside the photo of {width}×{height} pixels: make it smaller")
    # a very narrow part may be rounded to an edge between two pixels
    left, top = min(math.floor(left), width - 1), min(math.floor(top), height - 1)
    return left, top, max(math.ceil(right), left + 1), max(math.ceil(bottom), top + 1)


def _shown(numbers: Any) -> str:
    return ",".join(map(str, numbers))
