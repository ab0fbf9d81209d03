"""Photos of a request: data URLs, and files of one folder if that is allowed. Nothing is fetched from the network."""

import base64
import binascii
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from errors import UserError, shortened
from paths import is_file_in
from serving.protocol import RefusalError
from visual.photo import MAX_PIXELS, load_image

# The same sentence for files that are missing and that lie elsewhere, because it must not reveal what is on the disk.
NO_SUCH_FILE = "there is no such file in the folder that this server was started with (--allow-files)"


class PhotoFile(NamedTuple):
    """A photo that is not decoded yet; `param` names its field."""

    param: str
    content: io.BytesIO | Path


def find_photo(url: str, param: str, folder: Path | None) -> PhotoFile:
    """Return what `url` stands for.

    Args:
        folder: of which files may be named; None: of none.

    Raises:
        RefusalError: another kind of URL, broken base64, or a file that may not be read.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return PhotoFile(param, io.BytesIO(_data(url, param)))
    if scheme == "file":
        return PhotoFile(param, _file(url, param, folder))
    raise RefusalError(
        400,
        f"'{param}': this server fetches nothing from the network: send the photo itself, as data:image/jpeg;base64,…; "
        f"found {shortened(repr(url[:80]), 60)}",
        param,
    )


def _file(url: str, param: str, folder: Path | None) -> Path:
    """Return the path of `file:///…` in `folder`."""
    if folder is None:
        raise RefusalError(400, f"'{param}': no files are read, as --allow-files DIR was not given", param)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RefusalError(400, f"'{param}': {error}", param) from error
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise RefusalError(400, f"'{param}': write file:///FOLDER/NAME, with %23 for # and %3F for ?", param)
    file = url2pathname(parts.path)
    if not is_file_in(file, folder):
        raise RefusalError(400, f"'{param}': {NO_SUCH_FILE}", param)
    return Path(file)


def _data(url: str, param: str) -> bytes:
    """Decode `data:image/…;base64,…`."""
    head, comma, content = url.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RefusalError(400, f"'{param}': a photo is sent as data:image/jpeg;base64,… (or png, webp, gif)", param)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: a character beyond ASCII
        raise RefusalError(400, f"'{param}': not valid base64 ({error})", param) from error


def decode_photos(files: Iterable[PhotoFile], most_pixels: int) -> list[Image.Image]:
    """Decode the photos of a request, upright and in RGB.

    Args:
        most_pixels: of all photos together.

    Raises:
        RefusalError: a photo is broken, or there are too many pixels.
    """
    images: list[Image.Image] = []
    pixels = 0
    for file in files:
        try:
            image = load_image(file.content, min(MAX_PIXELS, most_pixels))
        except UserError as error:
            raise RefusalError(400, f"'{file.param}': {error}", file.param) from error
        pixels += image.width * image.height
        if pixels > most_pixels:
            raise RefusalError(
                413,
                f"'{file.param}': the photos of a request have more than {most_pixels / 1e6:g} megapixels together: "
                "send fewer or smaller ones",
                file.param,
            )
        images.append(image)
    return images
