"""Where things are: the repository root, and how a path in a config becomes a file or folder that exists."""

import difflib
from pathlib import Path
from typing import Literal

from errors import UserError, file_error, shortened

REPO_ROOT = Path(__file__).resolve().parent


def resolve_path(path: str | Path) -> Path:
    """A relative path counts from the repository root, whatever the working directory; `~` is expanded."""
    return REPO_ROOT / Path(path).expanduser()


def existing_path(path: str | Path, key: str, kind: Literal["file", "folder"] = "file") -> Path:
    """Resolve `path`, the value of config key `key`.

    Raises:
        UserError: it does not exist or is not of that kind; names the key and the nearest existing name.
    """
    resolved = resolve_path(path)
    if resolved.is_file() if kind == "file" else resolved.is_dir():
        return resolved
    try:
        exists = resolved.exists()
    except OSError as error:  # a name that is too long
        raise file_error(error, f"'{key}': {shortened(resolved)}") from error
    if exists:
        raise UserError(f"'{key}': {resolved} is not a {kind}")
    raise UserError(
        f"'{key}': {kind} not found: {shortened(resolved)}. {nearest_name_hint(resolved)}Change it with {key}=PATH"
    )


def nearest_name_hint(path: Path) -> str:
    """'Did you mean …? ' for a path whose name is misspelt, or which part of it does not exist; '' if unknown."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir() and parent != parent.parent:  # a missing drive (Windows) is its own parent
            parent, missing = parent.parent, parent
        return f"The folder {shortened(missing)} does not exist. "
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"Did you mean {parent / near[0]}? " if near else ""
