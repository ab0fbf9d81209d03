"""Uploaded photos: their folder, whose they are, and the check that no other file is opened.

Each folder has a lock, which the system releases when its page ends or is killed. The next start removes the folders
whose lock is free.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from errors import UserError
from page.texts import TEXTS
from paths import is_file_in

PREFIX = "vqa-photos-"
BATCH = " batch"  # after a session: holder of the batch tab's files, which stay when a new chat begins
# The same sentence for existing and missing files, because the page must not reveal what is on the server's disk.
NOT_UPLOADED = TEXTS["gone"][0]


class NotUploadedError(UserError):
    """A file is not an upload of this page, or is gone."""

    def __init__(self) -> None:
        super().__init__(NOT_UPLOADED)


class SessionFiles:
    """Files that sessions of the page hold; a file that no session holds any more is removed.

    Args:
        folder: of the uploads; nothing outside is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str | None, set[str]] = {}  # session → paths
        self._lock = threading.Lock()

    def hold(self, session: str | None, *paths: str) -> None:
        """Note that a session uses these files, which stay until it ends; None: the page itself, which outlives all."""
        with self._lock:
            self._held.setdefault(session, set()).update(paths)

    def release(self, session: str, keep: Iterable[str] = ()) -> None:
        """Let go of all files of a session but those to `keep`."""
        with self._lock:
            kept = self._held.pop(session, set())
            if staying := kept.intersection(keep):
                self._held[session] = staying
            for path in kept.difference(*self._held.values()):
                if is_file_in(path, self.folder):
                    with contextlib.suppress(OSError):  # the folder of another file of this content is not empty
                        Path(path).unlink()
                        Path(path).parent.rmdir()


@contextlib.contextmanager
def upload_folder(parent: Path | None = None) -> Iterator[Path]:
    """Create a private folder for uploads and remove it at the end; first remove folders of killed pages.

    Args:
        parent: default the system's folder for temporary files.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_leftovers(parent)
    folder = parent / f"{PREFIX}{secrets.token_hex(8)}"
    # locked before the folder exists, so that another start does not remove it as a leftover
    lock = filelock.FileLock(f"{folder}.lock", mode=0o600)
    try:
        with lock:
            folder.mkdir(mode=0o700)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(parent: Path) -> None:
    """Remove the folders in `parent` that pages of this user left behind when they were killed."""
    for lock_file in parent.glob(f"{PREFIX}*.lock"):
        if not _is_own_file(lock_file):  # another user's, or a link that leads elsewhere
            continue
        try:
            with filelock.FileLock(lock_file, blocking=False):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
        except (filelock.Timeout, OSError):  # Timeout: its page is running
            continue
        with contextlib.suppress(OSError):
            lock_file.unlink()


def _is_own_file(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())


def uploaded_photo(upload: Any, folder: Path) -> Path:
    """Return the file of a photo sent by a browser or an API client.

    Raises:
        NotUploadedError: it has a wrong form, or is not a file in `folder`; the same sentence for all.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or not is_file_in(path, folder):
        raise NotUploadedError
    file = Path(path)
    with contextlib.suppress(OSError):
        os.utime(file)  # uploads are kept for a time after their last use
    return file


def store(folder: Path, content: bytes, name: str) -> str:
    """Write a file into a folder named by its content, which sessions may share; return its path."""
    place = folder / hashlib.sha256(content).hexdigest()
    place.mkdir(mode=0o700, exist_ok=True)
    file = place / name
    if not file.exists():
        new = place / secrets.token_hex(8)  # so that a full disk leaves no half of a photo under its name
        try:
            new.write_bytes(content)
            new.replace(file)
        finally:
            new.unlink(missing_ok=True)
    os.utime(file)
    return str(file)


def photo_name(upload: Any) -> str:
    """Return the name of the user's file, for messages."""
    name = upload.get("orig_name") if isinstance(upload, dict) else None
    return name if isinstance(name, str) and name else "photo"
