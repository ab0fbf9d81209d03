"""`load_image`: any photo file → upright RGB picture, with bounded memory and without starting other programs.

This module imports no torch, so the decoding processes of `process_image.py` start in a fraction of a second and stay
small. `visual/transform.py` re-exports `load_image`.
"""

import io
import os
import stat
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from errors import UserError, file_error, shortened
from paths import address, shown_path
from visual.region import Region, pixel_box
from visual.shard import member_of, read_member
from visual.web import NO_SIZES, WebError

# Formats that Pillow may read. Formats that start another program (EPS: Ghostscript) and formats that no camera or
# website uses are excluded. JPEG includes MPO (cameras with several views), PPM covers PBM, PGM, PNM and PFM.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

# Decoding takes up to 12 bytes a pixel (progressive JPEG and AVIF 10 to 12, others 1 to 4, measured with Pillow 12.3),
# the RGB copy 4 after that: at most 0.8 GB for a photo.
MAX_PIXELS = 64_000_000
# The libraries behind these two formats take 16 to 20 bytes a pixel, so each of their pixels counts twice.
HEAVY_FORMATS = ("WEBP", "JPEG2000")

SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
BAND_PIXELS = 1_000_000  # converted to RGB at a time, to keep intermediate copies small

# EXIF orientation -> transpose that turns the stored photo upright (Exif 2.32, tag 0x0112)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # of these, width and height of the upright photo are those of the stored one exchanged
PNG_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts in which Pillow finds one; else chunk eXIf
TILE_SIZE_TAGS = (322, 323)  # TileWidth and TileLength (TIFF 6.0): a tile is decoded fully, also beyond the photo

# Pillow warns from 89 million pixels on, but `load_image` already rejects photos above MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(file: str | Path | BinaryIO | Image.Image | Region, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and decode a photo, or a region of one, as RGB, upright (EXIF orientation applied).

    Transparent pixels are blended with white, 16-bit gray is scaled to 8 bit, and an animation gives its first frame.
    The size in the header is compared with `max_pixels` (width × height) before decoding.

    Raises:
        UserError: no such file, empty, not one of `PHOTO_FORMATS`, cut off, too large, or without a clear RGB form; the
            message names the file. Or a region that is empty or not inside its photo.
    """
    if isinstance(file, Region):
        whole = load_image(file.photo, max_pixels)
        return whole.crop(pixel_box(file.box, *whole.size))
    if isinstance(file, Image.Image):
        image, orientation = _decode(file, "the given picture", max_pixels)
    else:
        content, name = _content(file) if isinstance(file, str | Path) else (file, "the given file")
        image, orientation = _decode_file(content, name, max_pixels)
    # last, after the memory of the decoded original is freed
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def photo_size(file: str | Path | Region) -> tuple[int, int]:
    """Width and height of an upright photo or of a region; errors as `load_image`.

    The pixels are not decoded, except those of a PNG with an orientation in a text (`PNG_ORIENTATION`) or behind them.
    """
    if isinstance(file, Region):
        assert isinstance(file.photo, str | Path), "only files have a header"
        left, top, right, bottom = pixel_box(file.box, *photo_size(file.photo))
        return right - left, bottom - top
    if address(file):
        raise WebError(f"{shortened(shown_path(file))}: {NO_SIZES}")
    content, name = _content(file)
    with _opened(content, name, MAX_PIXELS) as image:
        _check_size(image, name, MAX_PIXELS)
        width, height = image.size
        return (height, width) if _may_be_turned(image) and orientation_of(image) in SIDEWAYS else (width, height)


def _may_be_turned(image: ImageFile.ImageFile) -> bool:
    """Whether the photo of a header may have to be turned upright."""
    if image.format != "PNG":
        return image.format != "TIFF"  # Pillow turns it when it opens it
    # Pillow looks for an orientation behind the pixels too, and decodes them to get there
    stream = image.fp
    assert stream is not None, "an opened file"
    place, found = stream.tell(), False
    stream.seek(8)  # behind the signature
    while not found and len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = stream.tell()
        found = kind == b"eXIf" or stream.read(max(map(len, PNG_ORIENTATION))).startswith(PNG_ORIENTATION)
        stream.seek(start + length + 4)  # behind the checksum
    stream.seek(place)
    return found


def _content(file: str | Path) -> tuple[str | Path | BinaryIO, str]:
    """Return what Pillow opens, and its name."""
    if member := member_of(file):
        if not address(member.shard):
            _checked_name(member.shard)
        return io.BytesIO(read_member(member)), shown_path(file)
    return file, _checked_name(file)


def _checked_name(file: str | Path) -> str:
    try:
        status = os.stat(file)
    except FileNotFoundError as error:
        raise UserError(f"photo not found: {shortened(file)}") from error
    except OSError as error:  # a name that is too long, no permission for a folder
        raise file_error(error, f"photo {shortened(file)}") from error
    except ValueError as error:  # a NUL character, or one that the file system cannot encode
        raise UserError(f"{shortened(file)!r} is not a file name ({error})") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise UserError(f"{file}: {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}, not a photo")
    if status.st_size == 0:
        raise UserError(f"{file}: the file is empty, fetch the photo again")
    return str(file)


def _opened(file: str | Path | BinaryIO, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Open the photo and read its header."""
    try:
        return Image.open(file, formats=PHOTO_FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a format that is read: {', '.join(PHOTO_FORMATS)}") from error
    except Image.DecompressionBombError as error:
        limit = f"at most {max_pixels / 1e6:g} megapixels are decoded"
        raise UserError(f"{name}: too many pixels ({error}), {limit}; make the photo smaller") from error
    except PermissionError as error:
        raise file_error(error, name) from error
    except Exception as error:  # on damaged headers Pillow raises anything from OSError to RuntimeError
        raise UserError(f"{name}: cannot be read ({shortened(error)}), fetch the photo again") from error


def _decode_file(file: str | Path | BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, int | None]:
    """Open and `_decode` a file; a separate function frees the decoded original before the copy is rotated."""
    with _opened(file, name, max_pixels) as image:
        return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> tuple[Image.Image, int | None]:
    """Return RGB pixels as stored, and the EXIF orientation."""
    _check_size(image, name, max_pixels)
    try:
        image.load()
    except MemoryError as error:
        raise UserError(f"{name}: decoding {image.width:,} × {image.height:,} pixels needs more memory than is free: "
                        "make the photo smaller") from error  # fmt: skip
    except Exception as error:  # on damaged pixels Pillow raises anything, as on damaged headers
        raise UserError(f"{name}: damaged or cut off ({shortened(error)}), fetch the photo again") from error
    largest = image.getextrema()[1] if image.mode == "I" else 0
    assert not isinstance(largest, tuple), "an image of mode I has one band"
    if image.mode in ("F", "LAB") or largest > 65535:
        raise UserError(f"{name}: pixels of kind {image.mode} have no plain RGB form, save it with 8 or 16 bit")
    return _to_rgb(image), orientation_of(image)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    heavy = image.format in HEAVY_FORMATS
    limit = max_pixels // 2 if heavy else max_pixels
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in TILE_SIZE_TAGS]
    for width, height, what in (*[(*image.size, "")], (*tile, " in one tile")):
        if isinstance(width, int) and isinstance(height, int) and width * height > limit:
            raise UserError(
                f"{name}: {width * height / 1e6:,.1f} megapixels ({width:,} × {height:,}){what}, more than the "
                f"{limit / 1e6:g} that are decoded{f' of {image.format}' if heavy else ''}: make the photo smaller"
            )


def orientation_of(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an opened file, 1 without one; None: the block is damaged."""
    # not ImageOps.exif_transpose: it also rewrites the EXIF block, which fails for any damaged tag
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # struct.error, SyntaxError …: a damaged block does not make the pixels unusable
        return None
    return orientation if isinstance(orientation, int) else None  # a wrong type of the tag gives text, bytes …


def _to_rgb(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_band_to_rgb(band), (0, top))
    return rgb


def _band_to_rgb(band: Image.Image) -> Image.Image:
    if band.mode in SIXTEEN_BIT_MODES:
        gray = np.asarray(band).astype(np.float32) / 257  # 65535 / 257 = 255
        band = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if band.has_transparency_data:
        band = band.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")
    return band.convert("RGB")
