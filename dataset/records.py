"""Writing, reading and checking of the two files of a prepared data set, `image_map.json` and `captions.json`.

`process_image.py` writes them; training and evaluation read them. `write_records` describes their form.
"""

import contextlib
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from config import IMAGE_TAG
from dataset.json_files import read_json
from errors import UserError, file_error
from paths import REPO_ROOT
from visual.region import Box, Region, checked_box

TEXT_KEY = "text"  # key in captions.json of the entries without a photo
UNNAMED_SOURCE = "unnamed"  # source of entries in the report's form, which have no source

ImageMap = dict[str, dict[str, Any]]
Captions = dict[str, list[dict[str, Any]]]


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


def write_files(contents: dict[Path, Iterable[bytes]]) -> None:
    """Write all files under temporary names, then rename them.

    Raises:
        UserError: the disk is full, a folder is not writable or a path is a folder. The old files are unchanged, and
            no temporary file is left.
    """
    temporary = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in contents}
    path = None
    try:
        for path, pieces in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # renaming would fail after other files are renamed
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
            with open(temporary[path], "wb") as file:
                file.writelines(pieces)
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


def read_records(image_map: Path, captions: Path) -> tuple[dict[int, Photo], list[Entry]]:
    """Read and check both files.

    It also accepts the report's form of captions, where a value is one `{"q", "a"}`, and a single text for `"a"`. It
    does not check that the photos exist: `process_image.py` did, and `visual.transform.load_image` will.

    Returns:
        Photos by ID, and the entries in the order of the file.

    Raises:
        UserError: a file is missing, is not JSON or has a wrong form. The message has file, ID or key, and the remedy.
    """
    photos = photos_of(read_json(image_map), Path(image_map))
    return photos, entries_of(read_json(captions), Path(captions), photos, Path(image_map))


def entries_of(content: Any, file: Path, photos: dict[int, Photo], image_map: Path) -> list[Entry]:
    """Check the content of `captions.json` and return its entries in order; the files are named in errors."""
    if not isinstance(content, dict):
        _fail(file, "the file", f"is a {type(content).__name__}, not an object with photo IDs as keys")
    entries = []
    for key, value in content.items():
        if key != TEXT_KEY and not (key.isdecimal() and int(key) in photos):
            _fail(file, f"ID '{key}'", f"is not in {image_map}")
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            entries.append(_entry(file, key, number, item, photos))
    return entries


def photos_of(content: Any, file: Path) -> dict[int, Photo]:
    """Check the content of `image_map.json` and return its photos by ID; `file` is named in errors."""
    if not isinstance(content, dict):
        _fail(file, "the file", f"is a {type(content).__name__}, not an object with image keys")
    root = str(REPO_ROOT)
    photos: dict[int, Photo] = {}
    for key, value in content.items():
        match value:
            case {"ID": int(ID), "image_file": str(image_file), "path": str(path)} if not isinstance(ID, bool):
                if ID in photos:
                    _fail(file, f"ID {ID}", f"is given to both '{photos[ID].key}' and '{key}'")
                # not resolve_path: its three Path objects would take half the time of reading 300,000 photos
                file_path = Path(os.path.join(root, os.path.expanduser(path)))
                photos[ID] = Photo(ID, key, image_file, file_path, _box(value, key, file))
            case _:
                _fail(file, f"'{key}'", 'does not hold a whole number "ID" and texts "image_file" and "path"')
    missing = next((ID for ID in range(len(photos)) if ID not in photos), None)
    if missing is not None:
        _fail(file, f"ID {missing}", f"is missing: {len(photos)} photos must have the IDs 0 to {len(photos) - 1}")
    return photos


def _box(photo: dict[str, Any], key: str, file: Path) -> Box | None:
    if photo.get("box") is None:
        return None
    try:
        return checked_box(photo["box"])
    except UserError as error:
        _fail(file, f"'{key}'", f"has a wrong box ({error})")


def _entry(file: Path, key: str, number: int, item: Any, photos: dict[int, Photo]) -> Entry:
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


def _dialogue_turn(file: Path, where: str, index: int, turn: Any, first: Any, photos: dict[int, Photo]) -> Turn:
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


def _turn(file: Path, where: str, turn: dict[str, Any], kind: str, images: Any, photos: dict[int, Photo]) -> Turn:
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


def split_entries(
    photos: dict[int, Photo], entries: list[Entry], val_fraction: float
) -> tuple[list[Entry], list[Entry]]:
    """Split into (train, val) by a hash of the photo's key, or of the first question if there is no photo.

    Photos in one entry are linked, also indirectly through other photos. The alphabetically first key of linked photos
    decides for all of them. Therefore no photo is on both sides, all questions on a photo are on one side, and new data
    move only photos that they link. If more than half of all photos are linked to one another, these go to training,
    because too few would be left otherwise. `val_fraction` is in [0, 1). The share holds on average, so a small data
    set may have no validation part.

    Raises:
        UserError: entries link all photos, so no photo can be held out.
    """
    key_of = _deciding_keys(photos, entries)
    linked = Counter(key_of.values())
    largest, size = max(linked.items(), key=lambda item: item[1], default=("", 0))
    total = len({ID for entry in entries for ID in entry.images})
    if val_fraction > 0 and 1 < size == total:
        raise UserError(
            f"'data.val_fraction' = {val_fraction}: entries with several photos link all {size} photos to one another, "
            "so none can be held out: set it to 0, or leave some of these entries out"
        )
    train, val = [], []
    for entry in entries:
        first = next(iter(entry.images), None)
        name = entry.turns[0].question if first is None else key_of.get(first, photos[first].key)
        digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
        held_out = int.from_bytes(digest, "big") < val_fraction * 2**64
        if first in key_of and name == largest and 2 * size > total and size > 1:
            held_out = False
        (val if held_out else train).append(entry)
    return train, val


def _deciding_keys(photos: dict[int, Photo], entries: list[Entry]) -> dict[int, str]:
    """Return the smallest key of the linked photos, by photo ID; photos without links are left out."""
    parent: dict[int, int] = {}

    def root(ID: int) -> int:
        while parent.setdefault(ID, ID) != ID:
            parent[ID] = parent[parent[ID]]  # path halving
            ID = parent[ID]
        return ID

    for entry in entries:
        images = entry.images
        for ID in images[1:]:
            first, second = sorted((root(images[0]), root(ID)), key=lambda ID: photos[ID].key)
            parent[second] = first  # a root has the smallest key of its photos
    return {ID: photos[root(ID)].key for ID in list(parent)}
