"""JSON files, with errors that say where the mistake is; `dataset/raw.py` and `dataset/records.py` read with it."""

from pathlib import Path
from typing import Any

import orjson

from errors import UserError


def read_json(path: str | Path) -> Any:
    """Read a JSON file in UTF-8, with or without BOM.

    Raises:
        UserError: no such file, empty, not UTF-8 or not JSON; one sentence with file, line and column.
    """
    return _parse_json(_read_bytes(path), str(path))


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a file with one JSON value per line; blank lines are skipped. Raises as `read_json` does."""
    lines = enumerate(_read_bytes(path).split(b"\n"), start=1)
    return [_parse_json(line, str(path), number) for number, line in lines if line.strip()]


def _read_bytes(path: str | Path) -> bytes:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: file not found")
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise UserError(f"{file}: the file is empty, fetch it again")
    return content


def _parse_json(content: bytes, name: str, line: int = 1) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as wrong:
            line += content.count(b"\n", 0, wrong.start)
            raise UserError(f"{name}: line {line} is not UTF-8 text (byte {wrong.start}): save it as UTF-8") from wrong
        line += error.lineno - 1
        raise UserError(f"{name}: not valid JSON at line {line}, column {error.colno}: {error.msg}") from error
