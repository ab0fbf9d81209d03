"""Error messages for config keys, with the nearest valid key. Called by `config.py`."""

import difflib
import reprlib
from collections.abc import Collection
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from errors import shortened


def key_paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a schema in dotted form (`train.output_dir`); items of a list are written `data.sources.0.name`."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        inner, item = field.annotation, ""
        if get_origin(inner) is list:
            (inner,), item = get_args(inner), "0."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            paths += key_paths(inner, f"{prefix}{name}.{item}")
    return paths


def explain(item: ErrorDetails, keys: list[str], overrides: Collection[str] = ()) -> str:
    """Return the message for one mistake that pydantic found.

    Args:
        keys: all keys of the schema in dotted form, for the nearest valid key.
        overrides: keys that were set outside the file; the message of one of them says so.
    """
    path = ".".join(str(part) for part in item["loc"])
    said = "in an override: " if any(f"{path}.".startswith(f"{key}.") for key in overrides) else ""
    return said + _explain(item, keys, shortened(path))


def _explain(item: ErrorDetails, keys: list[str], key: str) -> str:
    if item["type"] == "extra_forbidden":
        parent = ".".join("0" if isinstance(part, int) else str(part) for part in item["loc"][:-1])
        siblings = [path for path in keys if path.rpartition(".")[0] == parent]
        leaf = shortened(item["loc"][-1])
        near = difflib.get_close_matches(leaf, [path.rpartition(".")[2] for path in siblings], n=1, cutoff=0.5)
        elsewhere = [path for path in keys if path.rpartition(".")[2] == leaf]
        if near:
            hint = f"did you mean '{(parent + '.' if parent else '') + near[0]}'?"
        elif elsewhere:
            hint = f"did you mean '{elsewhere[0]}'?"
        else:
            hint = "valid here: " + ", ".join(path.rpartition(".")[2] for path in siblings)
        return f"unknown key '{key}', {hint}"
    if item["type"] == "missing":
        return f"key '{key}' is missing"
    reason = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], dict):  # of a whole section: the reason names keys
        return f"'{key}': {reason}"
    shown = "…" if key.rpartition(".")[2] == "password" else _shown(item["input"])  # a message may stand in a log
    return f"'{key}' = {shown}: {reason}"


class _Shown(reprlib.Repr):
    """`repr` of at most a few hundred characters, also for recursive lists and very long numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxother = 2, 6, 4, 200, 200

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print numbers of more than a few thousand digits
        return repr(value) if abs(value) < 10**40 else f"a number of {value.bit_length()} bits"


_shown = _Shown().repr
