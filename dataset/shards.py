"""Loader of the format `webdataset`: samples in uncompressed tar files; see `visual/shard.py`.

Files of one sample follow one another and have the same name up to the first dot. A sample has photos and one text:

    000123.jpg  000123.json     a row of `dataset/turns.py` without the names of photos, or {"caption": text or list}
    000124.png  000124.txt      a caption

Its photos are those files, in their order. The shards of a folder are read in the order of their names, one header
after another, so they can be larger than the memory. A folder may also be at an address (`visual/web.py`).
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.json_files import parse_json
from dataset.rows import DropRowError, Row, RowPart
from errors import UserError, file_error, shortened
from paths import address
from visual.shard import Member, member_name, member_of
from visual.web import list_shards, open_web

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm")
TEXTS = (".json", ".txt")  # of a sample with both, the first counts
LONGEST_TEXT_FILE = 64 * 2**20  # bytes; a text of this size is none for a photo


def load_shards(annotations: Path, questions: Path | None, images: Path, encodings: dict[str, str]) -> "_Shards":
    """Return the rows of the shards in the folder `annotations`, which is the folder of the photos too.

    At an address, `annotations` may also be a pattern of shards in the folder `images`.
    """
    if address(annotations):
        folder = annotations.parent if annotations.suffix == ".tar" else annotations
        if folder != images:
            raise UserError(f"format webdataset has texts and photos in one folder: give {address(folder)} as 'images'")
        return _Shards(list_shards(annotations))
    if annotations.resolve() != images.resolve():
        raise UserError(f"format webdataset has texts and photos in one folder: give {annotations} as 'images' too")
    shards = sorted(annotations.glob("*.tar"))
    if not shards:
        raise UserError(f"{annotations}: no file that ends in .tar: is 'format' right?")
    return _Shards([str(shard) for shard in shards])


class _Shards:
    def __init__(self, shards: list[str]) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[Row]:
        for shard in self.shards:
            try:
                with (
                    open_web(shard) if address(shard) else open(shard, "rb") as file,
                    tarfile.open(fileobj=file, mode="r:") as tar,
                ):
                    yield from _rows(tar, shard)
            except tarfile.TarError as error:
                remedy = "fetch it again, or decompress it (gunzip)"
                raise UserError(
                    f"{shard}: damaged, or not an uncompressed tar file ({shortened(error)}): {remedy}"
                ) from error
            except OSError as error:
                raise file_error(error, shard) from error


def _rows(tar: tarfile.TarFile, shard: str) -> Iterator[Row]:
    sample, files = None, []
    for info in tar:
        if not info.isfile():
            continue
        name = PurePosixPath(info.name)
        own = name.with_name(name.name.partition(".")[0] or name.name)
        if own != sample and files:
            yield _row(tar, shard, str(sample), files)
            files = []
        sample = own
        files.append(info)
    if files:
        yield _row(tar, shard, str(sample), files)


def _row(tar: tarfile.TarFile, shard: str, sample: str, files: list[tarfile.TarInfo]) -> Row:
    """Make the row of one sample; a sample without photo or text, or with a broken one, has a problem."""
    place = f"sample {_in_utf8(sample)}"
    photos = [
        Member(Path(shard).name, member_name(info.name), info.offset_data, info.size)
        for info in files
        if _ends(info, PHOTOS)
    ]
    names = [_in_utf8(photo.path) for photo in photos]
    texts = [info for ending in TEXTS for info in files if _ends(info, (ending,))]
    try:
        if wrong := [name for info in files if (name := _in_utf8(info.name)) != info.name]:
            raise DropRowError("file name of the sample is not UTF-8", ", ".join(wrong))
        if not photos:
            raise DropRowError("sample without a photo", ", ".join(info.name for info in files))
        if any(".." in photo.name.split("/") for photo in photos):
            raise DropRowError("photo path leaves the shard", names[0])
        if any(member_of(photo.path) != photo for photo in photos):
            raise DropRowError("photo in a folder whose name ends in .tar", names[0])
        if not texts:
            raise DropRowError("sample without a text", ", ".join(info.name for info in files))
        value = _text(tar, shard, texts[0])
    except DropRowError as problem:
        return Row(None, (RowPart(place, names, shard),), problem)
    value = {key: own for key, own in value.items() if key not in ("image_id", "images")} | {"image": names}
    return Row(value, (RowPart(place, value, shard),))


def _text(tar: tarfile.TarFile, shard: str, info: tarfile.TarInfo) -> dict[str, Any]:
    if info.size > LONGEST_TEXT_FILE:
        raise DropRowError("text of the sample is too large", f"{info.name}: {info.size:,} bytes")
    opened = tar.extractfile(info)
    assert opened is not None, "an ordinary file"
    content = opened.read()
    try:
        if _ends(info, (".txt",)):
            return {"caption": content.decode("utf-8-sig").strip()}
        value = parse_json(content, f"{shard}/{info.name}")
    except UnicodeDecodeError as error:
        raise DropRowError("text of the sample is not UTF-8", info.name) from error
    except UserError as error:
        raise DropRowError("text of the sample is not JSON", error) from error
    if not isinstance(value, dict):
        raise DropRowError("text of the sample is not a JSON object", info.name)
    return value


def _in_utf8(name: str) -> str:
    r"""Return a name of a tar header with `\xd5` for a byte of another encoding, which no JSON file can have."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _ends(info: tarfile.TarInfo, endings: tuple[str, ...]) -> bool:
    return info.name.lower().endswith(endings)
