"""The rows of annotation files: as they were read, why one cannot be used, and the report of what became of them.

`dataset/formats.py` reads them, `dataset/raw.py` turns them into photos and questions.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import orjson

from config import IMAGE_TAG
from errors import shortened

EXAMPLES = 3  # of each reason, in the report
# Characters of one question or answer. At four characters a token this is more than the 131,072 tokens of the longest
# context window among the supported models, so no model can be trained on it.
LONGEST_TEXT = 600_000
# A character that one can see: neither white space nor a control character nor one that Unicode calls "default
# ignorable" (zero-width space, joiners, directions, fillers, variation selectors), nor the empty braille pattern.
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)


class DropRowError(Exception):
    """A row that cannot be used: a reason, the same for all rows of its kind, and what is wrong with this one."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, shortened(detail)


class Part(NamedTuple):
    """One row as it was read: `place` in `file`, for example `row 3`; a `file` of "" is the source's annotations."""

    place: str
    content: Any
    file: str = ""


class Row(NamedTuple):
    """What a reader parses as one, with the rows as they were read (of a photo's captions: several), or a problem."""

    value: Any
    parts: tuple[Part, ...]
    problem: DropRowError | None = None


@dataclass
class Report:
    """What became of one source's rows: `rows` = `kept` + all `dropped`; `dataset/formats.py` says what a row is."""

    source: str
    file: str = ""  # its annotations
    rows: int = 0
    kept: int = 0
    photos: int = 0  # new ones, not named by an earlier source
    questions: int = 0
    tags_added: int = 0  # rows kept that named a photo but no place for it; it came first
    blank_answers: int = 0  # left out of rows that have other answers
    encodings: dict[str, str] = field(default_factory=dict)  # of files that are not UTF-8
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "examples"}
    rejected: list[tuple[Part, str, str]] = field(default_factory=list)  # every dropped row, reason and detail

    def drop(self, parts: Iterable[Part], reason: str, detail: str) -> None:
        """Count and keep rows; the first three of a reason are shown as examples."""
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        for part in parts:
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                entry["examples"].append(shortened(f"{part.place}: {detail}"))
            self.rejected.append((part, reason, detail))

    def figures(self) -> dict[str, Any]:
        """All fields but the rejected rows, for `process_report.json`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rejected"}

    def rejected_lines(self) -> Iterator[bytes]:
        """The lines of `rejected.jsonl`: source, file, place, reason, detail and the row itself, whole."""
        for part, reason, detail in self.rejected:
            where = {"source": self.source, "file": part.file or self.file, "place": part.place}
            yield _json_line(where | {"reason": reason, "detail": detail, "row": part.content})


def _json_line(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # orjson reads values nested up to 1,024 levels deep, but writes 254
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 5_000)
        try:
            return json.dumps(value).encode() + b"\n"
        finally:
            sys.setrecursionlimit(limit)


def is_blank(text: str) -> bool:
    """Whether `text` holds no character that one can see."""
    return VISIBLE.search(text) is None


def check_text(value: Any, what: str) -> None:
    """Check the text of a question or an answer, which is `what` it is.

    Raises:
        DropRowError: no text, nothing visible, far too long, or a literal image tag.
    """
    if not isinstance(value, str) or is_blank(value):
        raise DropRowError(f"no {what}", shown(value))
    if len(value) > LONGEST_TEXT:
        raise DropRowError(f"{what} of more than {LONGEST_TEXT:,} characters", f"{len(value):,}: {shortened(value)}")
    if IMAGE_TAG in value:
        raise DropRowError(f"text holds a literal {IMAGE_TAG}", value)


def shown(value: Any) -> str:
    """`repr` of a value read from JSON, which may be nested too deeply for it."""
    try:
        return repr(value)
    except RecursionError:
        return f"{type(value).__name__}, deeply nested"
