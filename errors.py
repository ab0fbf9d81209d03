"""Two kinds of error: the user can fix a `UserError`; any other error is a defect and keeps its traceback.

Library errors are translated here or where the library is called, never by catching `ValueError` in a distant caller.
"""

from pathlib import Path
from typing import Any

LONGEST_VALUE = 200  # characters of a wrong value shown in a message


class UserError(ValueError):
    """A mistake in the user's files, settings or input: one sentence with what is wrong, where, and what to do."""


def shortened(text: object, longest: int = LONGEST_VALUE) -> str:
    """Return `text` as a string of at most `longest` characters; the middle of a longer text is left out."""
    text = str(text)
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def file_error(error: OSError, file: str | Path | None = None, advice: str = "") -> UserError:
    """Return a UserError for an operating system error (disk full, no permission); `file` replaces its file name."""
    name = file if file is not None else error.filename
    what = error.strerror or str(error) or type(error).__name__
    place = f"{shortened(name)}: " if name is not None else ""
    return UserError(f"{place}{what}{'; ' + advice if advice else ''}")


def check_text(text: str, name: str) -> None:
    """Raise UserError if `text` has half a surrogate pair, which tokenizers reject; the message starts with `name`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{name} is not valid Unicode text ({wrong} at character {error.start + 1}): write it in UTF-8"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory.

    torch raises its own class for CUDA. The CPU allocator, MPS and cuBLAS raise a RuntimeError with a typical text.
    An "illegal memory access" is a RuntimeError too, but a defect.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_defect(error: Exception) -> bool:
    """Whether neither the user's input nor a lack of memory explains an error."""
    return not isinstance(error, UserError) and not is_out_of_memory(error)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def require_complete(loading_info: dict[str, Any], key: str, folder: Path) -> None:
    """Check the loading info of transformers' `from_pretrained`; `key` is the config key of `folder`.

    Raises:
        UserError: tensors missing, left over or of the wrong shape; lists their names.
    """
    names = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of the wrong shape"}
    problems = [
        f"{meaning}: {_tensor_names(loading_info[name])}" for name, meaning in names.items() if loading_info[name]
    ]
    if problems:
        raise UserError(f"'{key}': the weights in {folder} do not fit their config.json; tensors {'; '.join(problems)}")


def _tensor_names(items: set[str] | set[tuple]) -> str:
    # a tensor of the wrong shape is given as (name, shape in the file, shape in the model)
    names = sorted(
        item if isinstance(item, str) else f"{item[0]} {[*item[1]]} instead of {[*item[2]]}" for item in items
    )
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
