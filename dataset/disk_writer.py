"""Writer of the record files of `dataset/disk_records.py`. Called by `process_image.py`.

Photos and entries go to a working file first. Its B-trees find a photo by its path, and keep the entries of a photo
together however far apart they come, as in `captions.json`. The two files are copied from it in order.
"""

import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
import time
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from dataset.disk_records import sqlite_error, sqlite_errors
from dataset.entries import TEXT_KEY
from dataset.records import temporary_name, write_files
from errors import file_error

CACHE_KIB = 400_000  # the digests of 10 million photos take about 600 MB, and a new one falls anywhere among them
WORKING_FOLDER, WORKING_FILE = ".records-", "working.sqlite"
ABANDONED_SECONDS = 24 * 3600  # a working file that nobody wrote to for this time belongs to a killed run
REMEDY = "make room there, or name another folder in 'data.captions'"

WORKING = """
CREATE TABLE names (digest BLOB PRIMARY KEY, ID INTEGER) WITHOUT ROWID;
CREATE TABLE photos (ID INTEGER PRIMARY KEY, key TEXT, image_file TEXT, path TEXT, box TEXT);
CREATE TABLE entries (
    first INTEGER, number INTEGER, photo INTEGER, content TEXT, PRIMARY KEY (first, number)
) WITHOUT ROWID;
"""
IMAGE_MAP = """
CREATE TABLE out.photos (
    ID INTEGER PRIMARY KEY, key TEXT NOT NULL, image_file TEXT NOT NULL, path TEXT NOT NULL, box TEXT
);
INSERT INTO out.photos SELECT ID, key, image_file, path, box FROM main.photos ORDER BY ID;
"""
CAPTIONS = """
CREATE TABLE out.entries (number INTEGER PRIMARY KEY, photo INTEGER, content TEXT NOT NULL);
INSERT INTO out.entries (photo, content) SELECT photo, content FROM main.entries ORDER BY first, number;
"""


class DiskRecords:
    """Photos and entries on the disk, with the methods of `dataset.register.Records`; a context that deletes its files.

    Args:
        folder: for the working file, which takes as much room as the two files together; None: the system's temporary
            folder.
    """

    def __init__(self, folder: Path | None) -> None:
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(folder)
            self._folder = tempfile.TemporaryDirectory(dir=folder, prefix=WORKING_FOLDER)
        except OSError as error:
            raise file_error(error, folder or tempfile.gettempdir(), REMEDY) from error
        self.file = Path(self._folder.name) / WORKING_FILE
        self.photos = 0
        self._first = array("q")  # number of the first entry under each photo; -1: none yet
        self._first_text = -1
        self._entries = 0
        self._spilled: list[BinaryIO] = []
        self._database = sqlite3.connect(self.file, isolation_level=None)
        with sqlite_errors(self.file, REMEDY):
            # a working file needs no protection from a crash
            self._database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {WORKING}")
            self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._database.execute("BEGIN")

    def _run(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        try:  # not `sqlite_errors`, which would take as long as the statement
            return self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise sqlite_error(error, self.file, REMEDY) from error

    def find(self, place: str) -> int | None:
        found = self._run("SELECT ID FROM names WHERE digest = ?", _digest("path", place))
        return None if found is None else found[0]

    def has_key(self, key: str) -> bool:
        return self._run("SELECT ID FROM names WHERE digest = ?", _digest("key", key)) is not None

    def add_photo(self, key: str, place: str, photo: dict[str, Any]) -> None:
        ID, box = photo["ID"], photo.get("box")
        for digest in (_digest("path", place), _digest("key", key)):
            self._run("INSERT INTO names VALUES (?, ?)", digest, ID)
        text = None if box is None else orjson.dumps(box).decode()
        self._run("INSERT INTO photos VALUES (?, ?, ?, ?, ?)", ID, key, photo["image_file"], photo["path"], text)
        self._first.append(-1)
        self.photos += 1

    def add_entry(self, key: str, entry: dict[str, Any]) -> None:
        number, photo = self._entries, None if key == TEXT_KEY else int(key)
        first = self._first_text if photo is None else self._first[photo]
        if first < 0:
            first = number
            if photo is None:
                self._first_text = number
            else:
                self._first[photo] = number
        content = orjson.dumps(entry).decode()
        self._run("INSERT INTO entries VALUES (?, ?, ?, ?)", first, number, photo, content)
        self._entries += 1

    def write(self, image_map: Path, captions: Path, beside: dict[Path, Iterable[bytes]]) -> None:
        """Write both files and those `beside` them, all completely or none; see `dataset.records.write_files`."""
        self._run("COMMIT")
        try:
            for path, statements in ((image_map, IMAGE_MAP), (captions, CAPTIONS)):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = temporary_name(path)
                temporary.unlink(missing_ok=True)
                self._run("ATTACH ? AS out", str(temporary))
                with sqlite_errors(path, REMEDY):
                    script = f"PRAGMA out.journal_mode = OFF; PRAGMA out.synchronous = OFF; BEGIN; {statements} COMMIT;"
                    self._database.executescript(script)
                self._run("DETACH out")
            write_files({**beside, image_map: None, captions: None})
        except OSError as error:
            raise file_error(error, image_map, REMEDY) from error
        finally:
            self._database.close()  # Windows deletes no open file
            for path in (image_map, captions):
                temporary_name(path).unlink(missing_ok=True)

    def spill(self) -> BinaryIO:
        """Return a new file for the rejected rows of a source; it lasts as long as the working file."""
        file = tempfile.TemporaryFile(dir=self._folder.name)  # noqa: SIM115 - closed with the working file
        self._spilled.append(file)
        return file

    def __enter__(self) -> "DiskRecords":
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()
        for file in self._spilled:
            file.close()
        self._folder.cleanup()


def _remove_abandoned(folder: Path) -> None:
    """Delete the working folders of killed runs: they are hidden, and take as much room as the records."""
    for old in folder.glob(f"{WORKING_FOLDER}*"):
        with contextlib.suppress(OSError):  # another run may delete it at the same time
            if time.time() - (old / WORKING_FILE).stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(old)


def _digest(kind: str, text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16, person=kind.encode()).digest()
