"""Photos and entries of the record files: their types, and the check of what a file holds.

Used by `dataset/records.py` and `dataset/disk_records.py`. `dataset.records.write_records` describes the form.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from config import IMAGE_TAG
from errors import UserError, shortened
from paths import REPO_ROOT, address
from visual.region import Box, Region, checked_box
from visual.shard import without_place

TEXT_KEY = "text"  # key in captions.json of the entries without a photo
UNNAMED_SOURCE = "unnamed"  # source of entries in the report's form, which have no source
_ROOT = str(REPO_ROOT)


@dataclass(frozen=True, slots=True)
class Photo:
    ID: int
    key: str
    image_file: str
    path: Path  # absolute
    box: Box | None = None  # of a region; None: the whole photo

    @property
    def picture(self) -> Path | Region:
        """What `visual.photo` reads."""
        return self.path if self.box is None else Region(self.path, self.box)

    def problem(self, error: Exception) -> str:
        """Return the sentence of an error with this photo, which it names if the sentence does not."""
        names = (Path(without_place(str(file))).name for file in (self.image_file, self.path))
        return str(error) if any(name in str(error) for name in names) else f"{shortened(self.key)}: {error}"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answers. `images` belong to its first tags, in order; later tags are text."""

    question: str
    answers: tuple[str, ...]  # each is correct; () only in a test set without references, see evaluation/standard.py
    type: str = ""  # question type, for the scores; "": the type of the entry
    images: tuple[int, ...] = ()  # photo IDs; (): a turn without a photo of its own


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of captions.json: a question or a dialogue."""

    source: str
    type: str
    turns: tuple[Turn, ...]
    id: int | str | None = None  # of the question or photo in a standard file, see evaluation/standard.py

    @property
    def images(self) -> tuple[int, ...]:
        """Photo IDs of all turns in reading order, with repetitions; () for text only."""
        if len(self.turns) == 1:
            return self.turns[0].images
        return tuple(ID for turn in self.turns for ID in turn.images)


def entries_of(content: Any, file: Path, photos: Mapping[int, Photo], image_map: Path) -> list[Entry]:
    """Check the content of `captions.json` and return its entries in order; the files are named in errors."""
    if not isinstance(content, dict):
        _fail(file, "the file", f"is a {type(content).__name__}, not an object with photo IDs as keys")
    entries = []
    for key, value in content.items():
        if key != TEXT_KEY and not (key.isdecimal() and int(key) in photos):
            _fail(file, f"ID '{key}'", f"is not in {image_map}")
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            entries.append(parse_entry(item, key, number, file, photos))
    return entries


def photos_of(content: Any, file: Path) -> dict[int, Photo]:
    """Check the content of `image_map.json` and return its photos by ID; `file` is named in errors."""
    if not isinstance(content, dict):
        _fail(file, "the file", f"is a {type(content).__name__}, not an object with image keys")
    photos: dict[int, Photo] = {}
    for key, value in content.items():
        match value:
            case {"ID": int(ID), "image_file": str(image_file), "path": str(path)} if not isinstance(ID, bool):
                if ID in photos:
                    _fail(file, f"ID {ID}", f"is given to both '{photos[ID].key}' and '{key}'")
                photos[ID] = Photo(ID, key, image_file, photo_path(path), photo_box(value, key, file))
            case _:
                _fail(file, f"'{key}'", 'does not hold a whole number "ID" and texts "image_file" and "path"')
    missing = next((ID for ID in range(len(photos)) if ID not in photos), None)
    if missing is not None:
        _fail(file, f"ID {missing}", f"is missing: {len(photos)} photos must have the IDs 0 to {len(photos) - 1}")
    return photos


def photo_path(path: str) -> Path:
    """Return the absolute path of a photo, or its address; a relative path starts at the repository root."""
    if ":/" in path and address(path):
        return Path(path)
    # not resolve_path: its three Path objects would take half the time of reading 300,000 photos
    return Path(os.path.join(_ROOT, os.path.expanduser(path)))


def photo_box(photo: dict[str, Any], key: str, file: Path) -> Box | None:
    """Check and return the box of a photo of the image map; None for a whole photo."""
    if photo.get("box") is None:
        return None
    try:
        return checked_box(photo["box"])
    except UserError as error:
        _fail(file, f"'{key}'", f"has a wrong box ({error})")


def parse_entry(item: Any, key: str, number: int, file: Path, photos: Mapping[int, Photo]) -> Entry:
    """Check entry `number` under `key` (photo ID or "text") and return it; `file` is named in errors."""
    where = f"ID {key}, entry {number}" if key != TEXT_KEY else f"'{TEXT_KEY}', entry {number}"
    if not isinstance(item, dict):
        _fail(file, where, f"is a {type(item).__name__}, not an object")
    source, turns = item.get("source", UNNAMED_SOURCE), item.get("turns", [item])
    kind = item.get("type", source)
    if not isinstance(source, str) or not isinstance(kind, str):
        _fail(file, where, '"source" and "type" must be texts')
    if not isinstance(turns, list) or not turns:
        _fail(file, where, '"turns" must be a list of at least one {"q", "a"}')
    first = [] if key == TEXT_KEY else [int(key)]
    images = item.get("images", first)
    if "turns" in item:
        read = tuple(_dialogue_turn(file, where, index, turn, images, photos) for index, turn in enumerate(turns))
    else:
        read = (_turn(file, where, item, "", images, photos),)
    entry = Entry(source, kind, read)
    shown = entry.images[:1]
    if shown != tuple(first):
        found = f"shows photo {shown[0]} first" if shown else "shows no photo"
        rule = f"the photo {key}, its key, must come first" if first else f"entries under '{TEXT_KEY}' have none"
        _fail(file, where, f"{found}, but {rule}")
    return entry


def _dialogue_turn(file: Path, where: str, index: int, turn: Any, first: Any, photos: Mapping[int, Photo]) -> Turn:
    """Read turn `index` of a dialogue; `first` are the entry's `"images"`, the photos of the first turn."""
    where = f"{where}, turn {index}"
    if not isinstance(turn, dict):
        _fail(file, where, f"is a {type(turn).__name__}, not an object")
    kind = turn.get("type", "")
    if not isinstance(kind, str):
        _fail(file, where, 'has a "type" that is no text')
    if index == 0 and "images" in turn:
        _fail(file, where, 'has "images", but those of the first turn stand in the entry, beside "turns"')
    return _turn(file, where, turn, kind, turn.get("images", []) if index else first, photos)


def _turn(file: Path, where: str, turn: dict[str, Any], kind: str, images: Any, photos: Mapping[int, Photo]) -> Turn:
    question, answers = turn.get("q"), turn.get("a")
    texts = [answers] if isinstance(answers, str) else answers
    asked = isinstance(question, str) and question.strip()
    if not (
        asked and isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    ):
        _fail(file, where, 'must have a question "q" and an answer or answers "a", texts that are not blank')
    if not isinstance(images, list):
        _fail(file, where, f'has "images" of the type {type(images).__name__}, not a list of photo IDs')
    for ID in images:
        if type(ID) is not int or ID not in photos:  # True is an int as well
            _fail(file, where, f"names the photo {ID!r}, which is not in the image map")
    tags = question.count(IMAGE_TAG)
    if tags < len(images):
        _fail(file, where, f"has {len(images)} photos but {tags} tags {IMAGE_TAG} in its question")
    return Turn(question, tuple(texts), kind, tuple(images))


def _fail(file: Path, where: str, problem: str) -> NoReturn:
    raise UserError(f"{file}: {where} {problem}; correct it or run process_image.py again")
