"""Uploaded photos: their folder, and the check that no other file is opened. Called by `test_gui.py`.

Each folder has a lock, which the system releases when its page ends or is killed. The next start removes the folders
whose lock is free.
"""

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from errors import UserError
from paths import is_file_in

PREFIX = "vqa-photos-"
# The same sentence for existing and missing files, because the page must not reveal what is on the server's disk.
NOT_UPLOADED = (
    "A photo was not uploaded here, or is gone: press Clear and add it again. "
    "有照片未在此上传或已被清除，请清空后重新添加。"
)


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
        UserError: it has a wrong form, or is not a file in `folder`; the same sentence for all.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or not is_file_in(path, folder):
        raise UserError(NOT_UPLOADED)
    file = Path(path)
    with contextlib.suppress(OSError):
        os.utime(file)  # uploads are kept for a time after their last use
    return file


def photo_name(upload: Any) -> str:
    """Return the name of the user's file, for messages."""
    name = upload.get("orig_name") if isinstance(upload, dict) else None
    return name if isinstance(name, str) and name else "photo"
