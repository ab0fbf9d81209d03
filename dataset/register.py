"""Photos and entries while raw annotations are converted: `dataset/raw.py` names photos, and this gives them IDs.

`MemoryRecords` becomes the two JSON files; `dataset.disk_writer.DiskRecords` has the same methods.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dataset.records import TEXT_KEY, Captions, ImageMap
from dataset.turns import Turns
from paths import address, resolve_path
from visual.region import Box
from visual.shard import without_place


class Records(Protocol):
    """What takes photos and entries."""

    @property
    def photos(self) -> int:
        """The ID of the next photo: the number of photos so far."""

    def find(self, place: str) -> int | None:
        """Return the ID of the photo or region at a place (see `_place`); None: unknown."""

    def has_key(self, key: str) -> bool: ...

    def add_photo(self, key: str, place: str, photo: dict[str, Any]) -> None: ...

    def add_entry(self, key: str, entry: dict[str, Any]) -> None: ...


class MemoryRecords:
    """Photos and entries in the form of the JSON files.

    Args:
        known: photos of earlier sources, which keep their IDs.
        start_ID: ID of the first new photo.
    """

    def __init__(self, known: ImageMap | None = None, start_ID: int = 0) -> None:
        self.known = known or {}
        self.start_ID = start_ID
        self.image_map: ImageMap = {}
        self.captions: Captions = {}
        self._ID_of_place = {_place(photo["path"], photo.get("box")): photo["ID"] for photo in self.known.values()}

    @property
    def photos(self) -> int:
        return self.start_ID + len(self.image_map)

    def find(self, place: str) -> int | None:
        return self._ID_of_place.get(place)

    def has_key(self, key: str) -> bool:
        return key in self.known or key in self.image_map

    def add_photo(self, key: str, place: str, photo: dict[str, Any]) -> None:
        self._ID_of_place[place] = photo["ID"]
        self.image_map[key] = photo

    def add_entry(self, key: str, entry: dict[str, Any]) -> None:
        self.captions.setdefault(key, []).append(entry)


class Register:
    """IDs and keys of the photos and regions of one source. Absolute path and box identify a photo, not its key."""

    def __init__(self, image_path: str | Path, source: str, records: Records) -> None:
        self.folder = address(image_path) or Path(image_path).as_posix()
        self.folder_name = Path(_absolute_folder(self.folder)).name or source
        self.source = source
        self.records = records

    def paths(self, turns: Turns) -> list[str]:
        """Return the photo files of a row, in reading order."""
        return [f"{self.folder}/{name}" for turn in turns for name in turn.get("images", ())]

    def enter(self, turns: Turns, entry: dict[str, Any]) -> str:
        """Replace photo names by IDs, as `write_records` describes; return the key of `entry` in captions."""
        IDs: list[list[int]] = []
        path = ""
        for turn in turns:
            IDs.append([self.get(path := own) for own in self.paths([turn])])
            if "box" in turn:
                IDs[-1].append(self.get(path, turn.pop("box")))
        first = next(itertools.chain.from_iterable(IDs), None)
        if first is not None and IDs[0] != [first]:
            entry["images"] = IDs[0]
        for turn in turns:
            turn.pop("images", None)
        for turn, own in zip(turns[1:], IDs[1:], strict=True):
            if own:
                turn["images"] = own
        return TEXT_KEY if first is None else str(first)

    def knows(self, path: str) -> bool:
        return self.records.find(_place(path)) is not None

    def get(self, path: str, box: Box | None = None) -> int:
        """Return the ID of a photo, or of the region `box` of it."""
        place = _place(path, box)
        ID = self.records.find(place)
        if ID is None:
            ID = self.records.photos
            name = without_place(path[len(self.folder) + 1 :])
            key = f"{self.folder_name}/{name}{_suffix(box)}"
            while self.records.has_key(key):
                key = f"{self.source}/{key}"
            photo = {"ID": ID, "image_file": name, "path": path} | ({} if box is None else {"box": [*box]})
            self.records.add_photo(key, place, photo)
        return ID


def _suffix(box: Sequence[float] | None) -> str:
    """Return what the key of a region has after that of its photo; as text, since (0, 0, 1, 1) equals (0.0, …)."""
    return "" if box is None else f"#{','.join(map(str, box))}"


def _place(path: str, box: Sequence[float] | None = None) -> str:
    """Return what identifies a photo or region: absolute path and edges, with what no path has between them."""
    return f"{_absolute_path(path)}\0{_suffix(box)}"


def _absolute_path(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{_absolute_folder(folder)}/{name}"


@functools.lru_cache(maxsize=100_000)
def _absolute_folder(folder: str) -> str:
    return address(folder) or os.path.abspath(resolve_path(folder))
