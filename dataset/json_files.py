"""JSON reader with error positions; used by `dataset/formats.py`, `dataset/records.py` and `process_image.py`.

It reads UTF-8, UTF-16 and UTF-32 with a byte order mark, and GB18030 (GBK, GB2312).
"""

import codecs
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from errors import UserError, file_error, shortened

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
DECODED = 2**20  # bytes of a long file that are decoded at once
UTF8_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


class Content(NamedTuple):
    """Content of a file: text as UTF-8 without byte order mark, possibly damaged, and the encoding of the file."""

    text: bytes
    encoding: str  # UTF-8 | UTF-16 | UTF-32 | GB18030


def read_json(path: str | Path) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32 with a byte order mark, or GB18030.

    Raises:
        UserError: the file is missing, empty, in another encoding or not JSON; one sentence with file, line and column.
    """
    return parse_json(read_content(path).text, str(path))


def read_content(path: str | Path) -> Content:
    """Read the whole file as UTF-8; damaged UTF-8 is returned unchanged. Other errors as `read_json`."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: file not found")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise file_error(error, file) from error
    for mark, encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            text = content[len(mark) :] if encoding == "UTF-8" else _transcoded(content, encoding, file)
            break
    else:
        text, encoding = content, "UTF-8"
        if not _is_utf8(content) and (decoded := _gb18030(content)) is not None:
            text, encoding = decoded, "GB18030"
    if not text.strip():
        raise UserError(f"{file}: the file is empty, fetch it again")
    return Content(text, encoding)


def utf8_start(file: Path) -> int | None:
    """Return where the text of a file in UTF-8 starts, behind a byte order mark.

    None: it has another encoding, or is damaged and has no such mark.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(4)
            for mark, encoding in BYTE_ORDER_MARKS:
                if beginning.startswith(mark):
                    return len(mark) if encoding == "UTF-8" else None
            opened.seek(0)
            while part := opened.read(DECODED):
                decoder.decode(part)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise file_error(error, file) from error
    return 0


def parse_json(text: bytes, name: str, line: int = 1) -> Any:
    """Parse a UTF-8 text, for example one line of a file; `line` is the line number of its start.

    Raises:
        UserError: the text is not UTF-8 or not JSON; one sentence with file, line and column.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as wrong:
            line += text.count(b"\n", 0, wrong.start)
            raise UserError(_not_text(text, name, line, wrong.start)) from wrong
        if b"\0" in text[:4]:
            raise UserError(f"{name}: UTF-16 or UTF-32 text without byte order mark: save it as UTF-8") from error
        line += error.lineno - 1
        message = f"{name}: not valid JSON at line {line}, column {error.colno}: {shortened(error.msg)}"
        raise UserError(message) from error


def _not_text(text: bytes, name: str, line: int, place: int) -> str:
    if _share_of_utf8(text) > 0.7:
        return f"{name}: line {line} is damaged: UTF-8 text around it, but not at byte {place}; fetch the file again"
    return (
        f"{name}: line {line} (byte {place}) is in none of the encodings that are read (UTF-8, GB18030, UTF-16 or "
        "UTF-32 with byte order mark): save the file as UTF-8"
    )


def _transcoded(content: bytes, encoding: str, file: Path) -> bytes:
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        sound = content[: getattr(error, "start", 0)].decode(encoding, errors="ignore")
        line = sound.count("\n") + 1
        raise UserError(f"{file}: begins as {encoding} text, but is damaged in line {line}; fetch it again") from error


def _is_utf8(content: bytes) -> bool:
    try:
        return content.isascii() or bool(content.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _gb18030(content: bytes) -> bytes | None:
    """Return `content` as UTF-8 if it is Chinese text in GB18030, else None.

    Strict decoding is not enough: most pairs of bytes above 127 decode to a Chinese character, also in Western,
    Japanese and Korean encodings and in damaged UTF-8. The characters must therefore also be common. GB2312 has
    punctuation in rows A1 to A3 and the 3,755 common characters in rows B0 to D7; they are nearly all of a modern text.
    Korean syllables end at row C8. A longer text with almost no character of later rows is classified as Korean.
    """
    if _share_of_utf8(content) > 0.7:
        return None
    try:
        text = content.decode("gb18030")
        characters = Counter(text)
        utf8 = text.removeprefix("\ufeff").encode("utf-8")
    except UnicodeError:
        return None
    total = common = high = 0
    for character, count in characters.items():
        if character > "\x7f":
            code = character.encode("gb18030")
            row = code[0] if len(code) == 2 and code[1] >= 0xA1 else 0
            total += count
            common += count if 0xA1 <= row <= 0xA3 or 0xB0 <= row <= 0xD7 else 0
            high += count if row > 0xC8 else 0
    korean = total >= 50 and high < 0.05 * total
    return utf8 if common > 0.6 * total and not korean else None


def _share_of_utf8(content: bytes) -> float:
    """Return the share of the bytes above 127 that belong to well-formed UTF-8 characters."""
    ascii_only = bytes(range(128))
    total = len(content.translate(None, ascii_only))
    rest = len(UTF8_CHARACTER.sub(b"", content).translate(None, ascii_only))
    return (total - rest) / total if total else 1.0
