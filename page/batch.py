"""Many questions of the batch tab: rows of uploaded files, their answers, and both as files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from answering.question_file import numbered_lines, parse_row, photo_names
from answering.request import AnyAnswerer, PhotoSource, Reply, Request, add_region
from config import Generate
from errors import UserError, check_text, shortened
from page.chat import UploadedPhoto, with_names
from qwen.chat import Message
from visual.region import checked_box

ROWS_AT_ONCE = 16  # answered together; the progress is shown, and Cancel acts, after each such batch
MOST_ROWS = 10_000
FORMULA_SIGNS = ("=", "+", "-", "@")  # of Excel and LibreOffice

Row = dict[str, Any]  # as in the file, or {"image", "question"}; with "answer" or "error" at the end


def read_rows(photos: list[UploadedPhoto], tables: list[UploadedPhoto], question: str) -> list[Row]:
    """Return the rows to answer: those of the files `tables`, else one for each photo.

    Raises:
        UserError: there are too many rows.
    """
    if not tables:
        return [{"image": photo.name, "question": question} for photo in photos] if question else []
    rows: list[Row] = []
    for table in tables:
        for number, line in numbered_lines(Path(table.path)):
            try:
                rows.append(parse_row(line))
            except UserError as error:
                rows.append({"line": number, "error": str(error)})
    if len(rows) > MOST_ROWS:
        raise UserError(
            f"{len(rows)} rows are more than the page answers at once ({MOST_ROWS}): use predict.py --input"
        )
    return rows


def answer_rows(
    engine: AnyAnswerer, rows: list[Row], photos: list[UploadedPhoto], settings: Generate, system: str
) -> Iterator[list[Row]]:
    """Answer rows in order; yield them, with "answer" or "error", in batches.

    Args:
        system: system message; empty: that of the training.
    """
    by_name: dict[str, set[str]] = {}
    for photo in photos:
        by_name.setdefault(_last_name(photo.name), set()).add(photo.path)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch, asked = rows[start : start + ROWS_AT_ONCE], []
        for row in batch:
            try:
                asked.append(_request(engine, row, by_name, system))
            except UserError as error:
                asked.append(error)
        replies = iter(engine.answer_many([item for item in asked if isinstance(item, Request)], settings))
        yield [
            _with_reply(row, next(replies) if isinstance(item, Request) else item, photos)
            for row, item in zip(batch, asked, strict=True)
        ]


def _last_name(path: str) -> str:
    return Path(path.replace("\\", "/")).name


def _request(engine: AnyAnswerer, row: Row, by_name: dict[str, set[str]], system: str) -> Request:
    """Return the request of a row.

    Raises:
        UserError: its line has an error, its question is missing, its box is wrong, or a photo is no name, or the name
            of no upload or of several.
    """
    if "error" in row:
        raise UserError(row["error"])
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f'"question" must be a text, found {shortened(repr(question))}')
    check_text(question, '"question"')
    photos: list[PhotoSource] = []
    for name in photo_names(row):
        paths = by_name.get(_last_name(name), set())
        if len(paths) != 1:
            reason = "is the name of several uploads: rename them" if paths else "was not uploaded: add it to the files"
            raise UserError(f"the photo {shortened(repr(name))} {reason}")
        photos += paths
    if row.get("box") is not None:
        add_region(photos, checked_box(row["box"]))
    messages = [Message("system", (system,))] if system else []
    return Request(photos, [*messages, engine.chat.typed_question(question, len(photos))])


def _shown_names(row: Row) -> str:
    """Return the names of a row's photos; empty if they are wrong, which its error says."""
    try:
        return ", ".join(photo_names(row))
    except UserError:
        return ""


def _with_reply(row: Row, reply: Reply | UserError, photos: list[UploadedPhoto]) -> Row:
    done = {"answer": reply.text} if isinstance(reply, Reply) else {"error": with_names(str(reply), photos)}
    return row | done


def as_table(rows: list[Row]) -> list[list[str]]:
    """Return photo, question and answer of each row, as texts."""
    return [
        [
            _shown_names(row),
            str(row.get("question", "")),
            row["answer"] if "answer" in row else f"⚠ {row['error']}",
        ]
        for row in rows
    ]


def as_jsonl(rows: list[Row]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode(errors="replace")


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS) else cell


def as_csv(rows: list[Row]) -> bytes:
    """Return the rows for a spreadsheet; the byte order mark tells Excel that it is UTF-8.

    An apostrophe stands before a text that a spreadsheet would take for a formula.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["image", "question", "answer", "error"])
    for row in rows:
        cells = [_shown_names(row), *(row.get(field, "") for field in ("question", "answer", "error"))]
        writer.writerow(map(_no_formula, cells))
    return file.getvalue().encode("utf-8-sig", errors="replace")
