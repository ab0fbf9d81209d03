"""Repository root, and resolution of the paths in a config to existing files and folders.

Relative paths in a config or a `key=value` start at the repository root. Paths typed as options (`--checkpoint`,
`--image`, `--input`, `--output`, `--resume`) start at the working directory, as in any shell command.
"""

import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import Literal

from errors import UserError, file_error, shortened

REPO_ROOT = Path(__file__).resolve().parent

Kind = Literal["file", "folder"]

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)  # two letters or more: "c:/" is a drive


def address(path: str | Path) -> str | None:
    """Return the address of something on the web, `https://…`; None: it is a path, and so is `file:…`.

    A `Path` keeps one of the two slashes, so it is the same address with one or two.
    """
    found = _ADDRESS.fullmatch(Path(path).as_posix())
    return f"{found[1]}://{found[2]}" if found and found[1] != "file" else None


def shown_path(path: str | Path) -> str:
    """Return a path or an address as messages show it."""
    return address(path) or str(path)


def resolve_path(path: str | Path) -> Path:
    """Return the path, relative to the repository root unless it is absolute; `~` is expanded."""
    return REPO_ROOT / os.path.expanduser(path)  # unlike Path.expanduser, it keeps '~name' if no such user exists


def existing_path(path: str | Path, key: str, kind: Kind = "file") -> Path:
    """Resolve `path`, the value of config key `key`.

    Raises:
        UserError: it does not exist or is not of that kind; names the key and the nearest existing name.
    """
    resolved = resolve_path(path)
    if _is_a(resolved, kind):
        return resolved
    try:
        resolved.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        hint = nearest_name_hint(resolved, kind)
        raise UserError(f"'{key}': {kind} not found: {shortened(resolved)}. {hint}Change it with {key}=PATH") from None
    except OSError as error:  # no permission, or a name that is too long
        raise file_error(error, f"'{key}': {shortened(resolved)}") from error
    raise UserError(f"'{key}': {shortened(resolved)} is not a {kind}")


def nearest_name_hint(path: Path, kind: Kind = "folder") -> str:
    """Return 'Did you mean …? ' for a misspelt path, or a sentence about its missing folder; '' if unknown.

    It suggests only paths of that kind, and no folder of code.
    """
    parent = path.parent
    if os.path.lexists(path):
        return f"It is no {kind}. "
    if not os.path.isdir(parent):
        missing = parent
        while not os.path.isdir(missing.parent) and missing != missing.parent:  # a missing drive is its own parent
            missing = missing.parent
        return f"The folder {shortened(missing)} does not exist. "
    names = []
    with contextlib.suppress(OSError):  # no permission to list the folder
        names = [entry.name for entry in parent.iterdir() if _can_be_meant(entry, kind)]
    near = difflib.get_close_matches(path.name[:255], names, n=1, cutoff=0.5)
    return f"Did you mean {shortened(parent / near[0])}? " if near else ""


def _can_be_meant(entry: Path, kind: Kind) -> bool:
    if kind == "file":
        return _is_a(entry, "file") and entry.suffix != ".py"
    return _is_a(entry, "folder") and not any(entry.glob("*.py"))


def _is_a(path: Path, kind: Kind) -> bool:
    # unlike Path.is_file, these accept names that are too long and folders without permission
    return os.path.isfile(path) if kind == "file" else os.path.isdir(path)


def is_file_in(path: str, folder: Path) -> bool:
    """Whether `path` is a file in `folder`, also after `..` and links are followed.

    The text is compared first, so that no other path is accessed on the disk.
    """
    if "\0" in path or not any(
        Path(os.path.abspath(path)).is_relative_to(top) for top in (folder.absolute(), folder.resolve())
    ):
        return False
    return os.path.isfile(path) and Path(path).resolve().is_relative_to(folder.resolve())


def check_folder(folder: Path, name: str) -> None:
    """Check without writing that `folder`, the value of key or option `name`, is a folder or can become one.

    Raises:
        UserError: a part of it is not a folder, is not writable, or is not a valid name.
    """
    place = folder.absolute()
    while not os.path.isdir(place):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            if place == place.parent:  # a missing drive
                raise UserError(f"{name}: {shortened(place)} does not exist") from None
            place = place.parent
        except OSError as error:
            raise file_error(error, f"{name}: {shortened(place)}", "name another folder") from error
        else:
            raise UserError(f"{name}: {shortened(place)} is not a folder, name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{name}: no permission to write in {shortened(place)}, name another folder")


def check_writable(file: Path, option: str) -> None:
    """Check that `file`, the value of command line option `option`, is writable; its content is kept.

    Called before long work, because the result would otherwise be lost at the end.

    Raises:
        UserError: it is a folder, its folder does not exist, or the system refuses to write it.
    """
    if os.path.isdir(file):
        raise UserError(f"{option}: {shortened(file)} is a folder, name a file in it")
    if not os.path.isdir(file.absolute().parent):
        raise UserError(f"the folder of {option} does not exist: {shortened(file.absolute().parent)}")
    existed = os.path.lexists(file)
    try:
        with open(file, "ab"):
            pass
    except OSError as error:
        raise file_error(error, f"{option}: {shortened(file)}", "name another file") from error
    if not existed:
        file.unlink()
