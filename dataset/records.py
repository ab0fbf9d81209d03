"""Writing, reading and splitting of the two files of a prepared data set, `image_map.json` and `captions.json`.

`process_image.py` writes them; training and evaluation read them. `write_records` describes their form. Names that end
in `.sqlite` mean the same records in the form of `dataset/disk_records.py`, for data sets larger than the memory.
"""

import contextlib
import errno
import hashlib
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import orjson

from dataset.disk_records import DiskEntries, DiskPhotos, SelectedEntries, on_disk
from dataset.entries import TEXT_KEY, UNNAMED_SOURCE, Entry, Photo, Turn, entries_of, photos_of
from dataset.json_files import read_json
from errors import UserError, file_error

__all__ = [
    "TEXT_KEY",
    "UNNAMED_SOURCE",
    "Captions",
    "Entry",
    "ImageMap",
    "Photo",
    "Turn",
    "entries_of",
    "json_pieces",
    "photos_of",
    "read_records",
    "split_entries",
    "temporary_name",
    "write_files",
    "write_json_files",
    "write_records",
]

ImageMap = dict[str, dict[str, Any]]
Captions = dict[str, list[dict[str, Any]]]


def write_records(
    image_map: ImageMap,
    captions: Captions,
    image_map_path: Path,
    captions_path: Path,
    beside: dict[Path, Iterable[bytes]] | None = None,
) -> None:
    """Write both files, UTF-8 and indented; each file is written completely or not at all.

    Args:
        image_map: `{key: {"ID": int, "image_file": str, "path": str}}`, path absolute or from the repository root. With
            `"box"` (see `visual/region.py`) it is a region of that photo, which has a key and an ID of its own.
        captions: `{"ID" or "text": [entry, …]}`; an entry is `{"source", "q", "a": [str, …]}` or, for a dialogue,
            `{"source", "turns": [{"q", "a"}, …]}`; `"type"` of entry or turn is optional. `"images": [ID, …]` of the
            entry are the photos of its first turn; the default is only the photo of the key. Each later turn may have
            its own `"images"`. The key is the first photo of the entry in reading order. If the first turn has no
            photo, `"images"` is `[]`, and the photos of a later turn start with the key. Entries under "text" have no
            photos. Photos belong to the first tags `<|extra_0|>` of their turn's question, in order; later tags are
            text.
        beside: other files to write at the same time, as pieces of their content.

    Raises:
        UserError: both paths are the same, or a file cannot be written.
    """
    if os.path.abspath(image_map_path) == os.path.abspath(captions_path):
        raise UserError(f"'data.image_map' and 'data.captions' are both {captions_path}: give them different names")
    contents = {image_map_path: image_map, captions_path: captions}
    write_files((beside or {}) | {path: json_pieces(value) for path, value in contents.items()})


def write_json_files(contents: dict[Path, Any]) -> None:
    """Write each value as JSON to its path; errors as `write_files`."""
    write_files({path: json_pieces(value) for path, value in contents.items()})


def json_pieces(value: Any) -> Iterator[bytes]:
    """Yield a value as indented JSON. It is encoded during writing, so memory holds one text at a time."""
    yield orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def temporary_name(path: Path) -> Path:
    """Return the name under which `write_files` writes a file before it renames it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_files(contents: Mapping[Path, Iterable[bytes] | None]) -> None:
    """Write all files under temporary names, then rename them.

    Args:
        contents: the pieces of each file; None: the file is there already, under its temporary name.

    Raises:
        UserError: the disk is full, a folder is not writable or a path is a folder. The old files are unchanged, and
            no temporary file is left.
    """
    temporary = {path: temporary_name(path) for path in contents}
    path = None
    try:
        for path, pieces in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # renaming would fail after other files are renamed
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
            with open(temporary[path], "r+b" if pieces is None else "wb") as file:
                file.writelines(pieces or ())
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as error:
        raise file_error(error, f"cannot write {path}", "mend that or choose another path") from error
    finally:
        for unfinished in temporary.values():
            with contextlib.suppress(OSError):  # a missing file can also raise NotADirectoryError
                unfinished.unlink()


def read_records(image_map: Path, captions: Path) -> tuple[Mapping[int, Photo], Sequence[Entry]]:
    """Read and check both files; records on the disk (`.sqlite`) stay there and are checked when they are used.

    It also accepts the report's form of captions, where a value is one `{"q", "a"}`, and a single text for `"a"`. It
    does not check that the photos exist: `process_image.py` did, and `visual.transform.load_image` will.

    Returns:
        Photos by ID, and the entries in the order of the file.

    Raises:
        UserError: a file is missing, is not JSON or has a wrong form. The message has file, ID or key, and the remedy.
    """
    if on_disk(image_map, captions):
        photos_on_disk = DiskPhotos(image_map)
        return photos_on_disk, DiskEntries(captions, photos_on_disk)
    photos = photos_of(read_json(image_map), Path(image_map))
    return photos, entries_of(read_json(captions), Path(captions), photos, Path(image_map))


def split_entries(
    photos: Mapping[int, Photo], entries: Sequence[Entry], val_fraction: float
) -> tuple[Sequence[Entry], Sequence[Entry]]:
    """Split into (train, val) by a hash of the photo's key, or of the first question if there is no photo.

    Photos in one entry are linked, also indirectly through other photos. The alphabetically first key of linked photos
    decides for all of them. Therefore no photo is on both sides, all questions on a photo are on one side, and new data
    move only photos that they link. If more than half of all photos are linked to one another, these go to training,
    because too few would be left otherwise. `val_fraction` is in [0, 1). The share holds on average, so a small data
    set may have no validation part.

    It reads the entries once and keeps some bytes of each.

    Raises:
        UserError: entries link all photos, so no photo can be held out.
    """
    limit = math.ceil(val_fraction * 2**64)  # a hash below it is held out
    first, held_out, shown = array("q"), bytearray(), bytearray(len(photos))
    links = _Links(photos)
    for entry in entries:
        images = entry.images
        first.append(images[0] if images else -1)
        held_out.append(not images and _hash(entry.turns[0].question) < limit)
        for ID in images:
            shown[ID] = 1
            links.add(images[0], ID)
    keys = photos.ordered_keys() if isinstance(photos, DiskPhotos) else (photos[ID].key for ID in range(len(photos)))
    hashes = numpy.fromiter(map(_hash, keys), numpy.uint64, len(photos))  # of the deciding key, by photo
    linked, roots = links.roots()
    hashes[linked] = hashes[roots]
    if len(linked):
        _, number, sizes = numpy.unique(roots, return_inverse=True, return_counts=True)
        size, total = int(sizes.max()), sum(shown)
        if val_fraction > 0 and size == total:
            raise UserError(
                f"'data.val_fraction' = {val_fraction}: entries with several photos link all {size} photos to one "
                "another, so none can be held out: set it to 0, or leave some of these entries out"
            )
        if 2 * size > total:
            hashes[linked[sizes[number] == size]] = 2**64 - 1
    photo_of = numpy.frombuffer(first, numpy.int64)
    held = numpy.frombuffer(held_out, numpy.bool_).copy()
    held[photo_of >= 0] = hashes[photo_of[photo_of >= 0]] < numpy.uint64(limit)
    return _chosen(entries, ~held), _chosen(entries, held)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _chosen(entries: Sequence[Entry], chosen: numpy.ndarray) -> Sequence[Entry]:
    indices = array("q", numpy.flatnonzero(chosen).tobytes())
    if isinstance(entries, DiskEntries):
        return SelectedEntries(entries, indices)
    return [entries[index] for index in indices]


class _Links:
    """Photos that entries show together; the root of linked photos has the smallest key of them."""

    def __init__(self, photos: Mapping[int, Photo]) -> None:
        self.photos = photos
        self.parent: array[int] | None = None  # by ID; -1: not linked

    def add(self, ID: int, other: int) -> None:
        if other == ID:
            return
        if self.parent is None:
            self.parent = array("q", [-1]) * len(self.photos)
        first, second = sorted((self._root(ID), self._root(other)), key=lambda ID: self.photos[ID].key)
        self.parent[second] = first

    def _root(self, ID: int) -> int:
        parent = self.parent
        assert parent is not None, "made by `add`"
        if parent[ID] < 0:
            parent[ID] = ID
        while parent[ID] != ID:
            parent[ID] = parent[parent[ID]]  # path halving
            ID = parent[ID]
        return ID

    def roots(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return the IDs of all linked photos, and the root of each."""
        if self.parent is None:
            return numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int64)
        parent = numpy.frombuffer(self.parent, numpy.int64)
        linked = numpy.flatnonzero(parent >= 0)
        roots = parent[linked]
        while (parent[roots] != roots).any():
            roots = parent[roots]
        return linked, roots
