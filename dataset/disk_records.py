"""Record files for millions of rows: photos and entries that stay on the disk and are read one by one.

`image_map.sqlite` holds the photos of an `image_map.json`, `captions.sqlite` the entries of a `captions.json`, in the
same order. SQLite belongs to Python, finds a row by its number in some microseconds, sorts and searches what does not
fit into memory, and any tool shows its tables:

    photos (ID, key, image_file, path, box)     box: JSON, or NULL for the whole photo
    entries (number, photo, content)            number from 1; photo NULL: text only; content: the entry as JSON

`dataset/disk_writer.py` writes the files; `dataset.records.read_records` opens them.
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset.entries import TEXT_KEY, Entry, Photo, parse_entry, photo_box, photo_path
from dataset.json_files import parse_json
from errors import UserError, file_error

SUFFIX = ".sqlite"
REMEDY = "make it again with process_image.py"


def on_disk(image_map: Path, captions: Path) -> bool:
    """Return whether the two files are in the form of this module, by their endings.

    Raises:
        UserError: one of them is and the other is not.
    """
    forms = {Path(file).suffix == SUFFIX for file in (image_map, captions)}
    if len(forms) == 2:
        raise UserError(
            f"'data.image_map' = {image_map} and 'data.captions' = {captions}: let both end in {SUFFIX} (records on "
            "the disk) or neither (JSON)"
        )
    return forms == {True}


def sqlite_error(error: sqlite3.Error, file: Path, remedy: str) -> UserError:
    """Return a UserError that names the file and what to do."""
    return UserError(f"{file}: {error}; {remedy}")


@contextmanager
def sqlite_errors(file: Path, remedy: str) -> Iterator[None]:
    """Convert errors of SQLite as `sqlite_error` does."""
    try:
        yield
    except sqlite3.Error as error:
        raise sqlite_error(error, file, remedy) from error


class DiskTable:
    """A table with rows numbered without gaps from `start`. Each process opens the file at its first access.

    Memory holds SQLite's cache of 2 MB; the operating system caches the file as it does any other.

    Attributes:
        table: name of the table.
        number: its column with the numbers.
        start: the first number.

    Raises:
        UserError: as `select`, or a number is missing.
    """

    table: str
    number: str
    start: int

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._state: tuple[int, ...] | None = None  # of the file that the run began with
        counted = f"SELECT count(*), min({self.number}), max({self.number}) FROM {self.table}"
        ((self._length, first, last),) = self.select(counted)
        if self._length and (first, last) != (self.start, self.start + self._length - 1):
            raise UserError(f"{self.file}: rows of '{self.table}' are missing; {REMEDY}")

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None, "_process": 0}

    def select(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query.

        Raises:
            UserError: the file is missing, damaged or no record file, or was replaced since it was first read.
        """
        with sqlite_errors(self.file, REMEDY):
            if self._connection is None or self._process != os.getpid():  # a forked worker must not share it
                self._check_state()
                address = f"{self.file.absolute().as_uri()}?mode=ro&immutable=1"
                self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
                self._process = os.getpid()
            yield from self._connection.execute(query, values)

    def _check_state(self) -> None:
        """Raise UserError unless the file is the one that this object, here or in another process, opened first."""
        try:
            found = os.stat(self.file)
        except OSError as error:
            raise file_error(error, self.file, REMEDY) from error
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._state not in (None, state):
            raise UserError(f"{self.file} was replaced while this run reads it: start the run again")
        self._state = state


class DiskPhotos(DiskTable, Mapping[int, Photo]):
    """The photos of `image_map.sqlite` by ID."""

    table, number, start = "photos", "ID", 0

    def __getitem__(self, ID: int) -> Photo:
        for row in self.select("SELECT ID, key, image_file, path, box FROM photos WHERE ID = ?", ID):
            return self._photo(*row)
        raise KeyError(ID)

    def __contains__(self, ID: object) -> bool:
        return isinstance(ID, int) and 0 <= ID < len(self)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def ordered_keys(self) -> Iterator[str]:
        """Yield the key of every photo, from ID 0 on."""
        return (key for (key,) in self.select("SELECT key FROM photos ORDER BY ID"))

    def _photo(self, ID: int, key: str, image_file: str, path: str, box: str | None) -> Photo:
        edges = None if box is None else parse_json(box.encode(), f"{self.file}: '{key}'")
        return Photo(ID, key, image_file, photo_path(path), photo_box({"box": edges}, key, self.file))


class DiskEntries(DiskTable, Sequence[Entry]):
    """The entries of `captions.sqlite`; `photos` are those of its image map."""

    table, number, start = "entries", "number", 1

    def __init__(self, file: Path, photos: DiskPhotos) -> None:
        super().__init__(file)
        self.photos = photos

    def __getitem__(self, index: Any) -> Entry:
        for row in self.select("SELECT number, photo, content FROM entries WHERE number = ?", index + 1):
            return self._entry(*row)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Entry]:
        return self.among(range(len(self)))

    def among(self, indices: Sequence[int]) -> Iterator[Entry]:
        """Yield the entries with these indices, which ascend; faster than one by one if they are many."""
        rows = self.select("SELECT number, photo, content FROM entries ORDER BY number")
        for index in indices:
            yield self._entry(*next(row for row in rows if row[0] == index + 1))

    def _entry(self, number: int, photo: int | None, content: str) -> Entry:
        key = TEXT_KEY if photo is None else str(photo)
        item = parse_json(content.encode(), f"{self.file}: entry {number}")
        return parse_entry(item, key, number, self.file, self.photos)


class SelectedEntries(Sequence[Entry]):
    """Some of the entries on the disk, by their ascending indices."""

    def __init__(self, entries: DiskEntries, indices: Sequence[int]) -> None:
        self.entries, self.indices = entries, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Entry:
        return self.entries[self.indices[index]]

    def __iter__(self) -> Iterator[Entry]:
        return self.entries.among(self.indices)
