"""Rows of annotation files, reasons to reject a row, and the report of a source.

`dataset/formats.py` reads the rows; `dataset/raw.py` converts them to photos and questions.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, BinaryIO, NamedTuple

import orjson

from config import IMAGE_TAG
from errors import file_error, shortened

EXAMPLES = 3  # per reason, in the report
_ROWS = ("rejected", "kept_rows", "spill")  # fields of `Report` that hold rows
_COLUMNS = {
    "rows": "rows read",
    "kept": "rows kept",
    "photos": "new photos",
    "questions": "questions",
    "tags_added": "tags added",
}
# Characters of one question or answer. At four characters per token this exceeds 131,072 tokens, the longest context
# window of the supported models, so no model can be trained on a longer text.
LONGEST_TEXT = 600_000
# A visible character: not white space, not a control character, not a "default ignorable" character of Unicode
# (zero-width space, joiners, directions, fillers, variation selectors), and not the empty braille pattern.
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)


class DropRowError(Exception):
    """An unusable row: a reason, equal for all rows with this problem, and the detail of this row."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, shortened(detail)


class RowPart(NamedTuple):
    """One row as read: `place` in `file`, for example `row 3`; `file` "" means the source's annotations."""

    place: str
    content: Any
    file: str = ""


class Row(NamedTuple):
    """Unit of parsing: a value with the rows it was read from (several for COCO captions), or a problem.

    A row has both if only its references are missing, because the whole file is a test set without references.
    `dataset/raw.py` rejects it; `evaluation/standard.py` asks it.
    """

    value: Any
    parts: tuple[RowPart, ...]
    problem: DropRowError | None = None


@dataclass
class Report:
    """Counts of one source: `rows` = `kept` + all `dropped`; `dataset/formats.py` defines a row."""

    source: str
    file: str = ""  # annotation file
    rows: int = 0
    kept: int = 0
    photos: int = 0  # new photos, not in an earlier source
    questions: int = 0
    tags_added: int = 0  # kept rows with photos but without tags; the photos are placed before the question
    blank_answers: int = 0  # removed from rows that have other answers
    encodings: dict[str, str] = field(default_factory=dict)  # encodings of files that are not UTF-8
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "examples"}
    rejected: list[tuple[RowPart, str, str]] = field(default_factory=list)  # every dropped row, reason and detail
    # If a dict is given: the kept rows under their keys in the captions, in the order of the entries there.
    kept_rows: dict[str, list[Any]] | None = None
    # If a file is given: it gets the lines of `rejected.jsonl` at once, and `rejected` stays empty.
    spill: BinaryIO | None = None

    def drop(self, parts: Iterable[RowPart], reason: str, detail: str) -> None:
        """Count and store rejected rows; the first `EXAMPLES` of a reason are its examples."""
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        for part in parts:
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                entry["examples"].append(shortened(f"{part.place}: {detail}"))
            if self.spill is None:
                self.rejected.append((part, reason, detail))
            else:
                try:
                    self.spill.write(self._line(part, reason, detail))
                except OSError as error:
                    raise file_error(error, "rejected.jsonl", "make room on its disk") from error

    def figures(self) -> dict[str, Any]:
        """Return all fields except the rows, for `process_report.json`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _ROWS}

    def rejected_lines(self) -> Iterator[bytes]:
        """Yield the lines of `rejected.jsonl`: source, file, place, reason, detail and the whole row."""
        if self.spill is not None:
            self.spill.seek(0)
            yield from self.spill
        for part, reason, detail in self.rejected:
            yield self._line(part, reason, detail)

    def _line(self, part: RowPart, reason: str, detail: str) -> bytes:
        where = {"source": self.source, "file": part.file or self.file, "place": part.place}
        return _json_line(where | {"reason": reason, "detail": detail, "row": part.content})


def report_text(reports: list[Report]) -> str:
    """A table with one line per source and the total, then the dropped rows by reason with examples."""
    counts = [[report.source, *(getattr(report, name) for name in _COLUMNS)] for report in reports]
    total = ["total", *(sum(column) for column in list(zip(*counts, strict=True))[1:])]
    width = max(len(name) for name in [*(report.source for report in reports), "source", "total"])
    lines = [f"{'source':{width}}" + "".join(f"  {title:>10}" for title in _COLUMNS.values())]
    lines += [f"{row[0]:{width}}" + "".join(f"  {number:>10,}" for number in row[1:]) for row in [*counts, total]]
    for report in reports:
        lines += [f"{report.source}: {file} is read as {encoding}" for file, encoding in report.encodings.items()]
        if report.blank_answers:
            lines.append(f"{report.source}: {report.blank_answers:,} blank answers left out of rows that have others")
        for reason, entry in report.dropped.items():
            lines.append(f"{report.source}: dropped {entry['count']:,} rows, {reason}; for example")
            lines += [f"    {example}" for example in entry["examples"]]
    return "\n".join(lines)


def _json_line(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # orjson reads up to 1,024 nested levels, but writes only 254
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 5_000)
        try:
            return json.dumps(value).encode() + b"\n"
        finally:
            sys.setrecursionlimit(limit)


def is_blank(text: str) -> bool:
    """Return whether `text` has no visible character."""
    return VISIBLE.search(text) is None


def check_text(value: Any, what: str) -> None:
    """Check the text of a question or an answer; `what` is the word for messages.

    Raises:
        DropRowError: not a text, no visible character, too long, or a literal image tag.
    """
    if not isinstance(value, str) or is_blank(value):
        raise DropRowError(f"no {what}", shown(value))
    if len(value) > LONGEST_TEXT:
        raise DropRowError(f"{what} of more than {LONGEST_TEXT:,} characters", f"{len(value):,}: {shortened(value)}")
    if IMAGE_TAG in value:
        raise DropRowError(f"text holds a literal {IMAGE_TAG}", value)


def shown(value: Any) -> str:
    """Return the `repr` of a JSON value, or its type if it is nested too deeply for `repr`."""
    try:
        return repr(value)
    except RecursionError:
        return f"{type(value).__name__}, deeply nested"
