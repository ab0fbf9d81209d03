"""Error messages for config keys, with the nearest valid key. Called by `config.py`."""

import difflib
import reprlib

from pydantic_core import ErrorDetails

from errors import shortened


def explain(item: ErrorDetails, keys: list[str]) -> str:
    """Return the message for one mistake that pydantic found.

    Args:
        keys: all keys of the schema in dotted form, for the nearest valid key.
    """
    key = shortened(".".join(str(part) for part in item["loc"]))
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
