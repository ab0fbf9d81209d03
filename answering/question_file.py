"""A file of questions in, the same rows with answers out. Called by `predict.py`, which describes the rows."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from answering.connection import ServerGoneError
from answering.request import AnyAnswerer, PhotoSource, Reply, Request, add_region
from config import IMAGE_TAG
from dataset.rows import DropRowError
from dataset.turns import IMAGE_WORD, Turns, box_of, place_photos
from errors import UserError, check_text, file_error, is_out_of_memory, shortened

ROWS_AT_ONCE = 1024  # rows in memory; a batch is far smaller


def answer_file(answerer: AnyAnswerer, source: Path, target: Path) -> tuple[int, int]:
    """Answer the rows of `source` in order, writing the lines of a batch as soon as it is answered.

    Returns:
        The number of rows answered and of rows with an error.
    """
    counts = {"answer": 0, "error": 0}
    numbered = numbered_lines(source)
    try:
        # half a surrogate pair is legal in JSON but not in UTF-8: it becomes "?"
        with (
            target.open("w", encoding="utf-8", errors="replace") as output,
            tqdm(total=len(numbered), desc="rows", unit="row", dynamic_ncols=True) as progress,
        ):
            for start in range(0, len(numbered), ROWS_AT_ONCE):
                for row in _answered(answerer, numbered[start : start + ROWS_AT_ONCE], source.parent):
                    counts["error" if "error" in row else "answer"] += 1
                    print(json.dumps(row, ensure_ascii=False), file=output, flush=True)
                    progress.update()
    except OSError as error:  # the output file failed (disk full); `_answered` handles the errors of a row
        raise file_error(error, target) from error
    return counts["answer"], counts["error"]


def numbered_lines(source: Path) -> list[tuple[int, bytes]]:
    """Return the lines of a file that are not empty, with their numbers."""
    lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # Windows editors add a byte order mark
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _answered(answerer: AnyAnswerer, lines: list[tuple[int, bytes]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each row with its answer or its error; a failed row does not end the file."""
    rows: list[tuple[dict[str, Any], Request | Exception]] = []
    for number, line in lines:
        row: dict[str, Any] = {"line": number}
        try:
            row = parse_row(line)
            rows.append((row, _request(answerer, row, folder)))
        except Exception as error:
            _raise_hopeless(error)
            rows.append((row, error))
    replies = _replies(answerer, [request for _, request in rows if isinstance(request, Request)])
    for row, request in rows:
        reply = next(replies) if isinstance(request, Request) else request
        if isinstance(reply, Reply):
            yield row | {"answer": reply.text}
        elif isinstance(reply, UserError):
            yield row | {"error": str(reply)}
        else:  # a defect; a bad row has no error type
            yield row | {"error": f"{type(reply).__name__}: {shortened(reply)}"}


def _replies(answerer: AnyAnswerer, requests: list[Request]) -> Iterator[Reply | Exception]:
    """Answer the requests together; after a defect, answer the rest one by one, so that only the defect's row fails."""
    done = 0
    try:
        for reply in answerer.answer_many(requests):
            yield reply
            done += 1
    except Exception as error:
        _raise_hopeless(error)
        for request in requests[done:]:
            try:
                yield answerer.stream_messages(*request).rest()
            except Exception as own:
                _raise_hopeless(own)
                yield own


def _raise_hopeless(error: Exception) -> None:
    """Raise what every other row would meet too."""
    if is_out_of_memory(error) or isinstance(error, ServerGoneError):
        raise error


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the row of a line, without answers of an earlier run.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        row = json.loads(line, parse_constant=_no_number, parse_float=_finite)
        json.dumps(row, ensure_ascii=False)  # some rows can be read but not written, as with deeply nested brackets
    except RecursionError as error:
        raise UserError("brackets are nested too deeply") from error
    except ValueError as error:
        raise UserError(f"not valid JSON in UTF-8: {shortened(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f'expected {{"image": …, "question": …}}, found {type(row).__name__}')
    return {key: value for key, value in row.items() if key not in ("answer", "error")}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shortened(text, 40))


def _request(answerer: AnyAnswerer, row: dict[str, Any], folder: Path) -> Request:
    """Return the last question of `row`, with the dialogue before it.

    Raises:
        UserError: the row has a wrong form, or a photo is missing.
    """
    turns = _turns(row)
    for photo in (folder / name for turn in turns for name in turn.get("images", ())):
        if not os.path.isfile(photo):  # accepts names of any kind and length
            raise UserError(f"photo not found: {shortened(photo)}")
    chat, messages = answerer.chat, []
    photos: list[PhotoSource] = []
    for turn in turns:
        before = len(photos)
        photos += [folder / name for name in turn.get("images", ())]
        if "box" in turn:
            add_region(photos, turn["box"])
        messages.append(chat.question(turn["q"], len(photos) - before))
        if turn is not turns[-1]:
            messages.append(chat.answer(turn["a"]))
    return Request(photos, messages)


def _turns(row: dict[str, Any]) -> Turns:
    """Return the turns of a row, with photos at tags in the questions as in training; the last turn has no answer."""
    names = photo_names(row)
    items, where = [row], ""
    if "conversations" in row:
        items, where = _pairs(row["conversations"]), "a human turn: "
    elif "turns" in row:
        items, where = row["turns"], "a turn: "
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UserError(f'"turns" must be a list of objects, found {shortened(repr(items))}')
    turns = []
    for number, item in enumerate(items, start=1):
        turns.append({"q": _text(item, "question", where)})
        if number < len(items):
            turns[-1]["a"] = _text(item, "answer", where)
    own = [photo_names(item) if item is not row else [] for item in items]
    try:
        for turn, item in zip(turns, items, strict=True):
            turn |= box_of(item)
        turns[0] = box_of(row) | turns[0]
        if not any(own):
            return place_photos(turns, names, {})
        if names and own[0]:
            raise UserError("the row and its first turn both name photos: name them in one place")
        own[0] = own[0] or names
        return [
            place_photos([turn], photos, {}, seen=any(own[:number]))[0]
            for number, (turn, photos) in enumerate(zip(turns, own, strict=True))
        ]
    except DropRowError as problem:
        raise UserError(f"{problem.reason}: {problem.detail}") from problem


def _pairs(messages: Any) -> list[dict[str, Any]]:
    """Convert LLaVA's alternating `human` and `gpt` messages to questions and answers."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f'"conversations" must be a list of messages, found {shortened(repr(messages))}')
    speakers = [message.get("from") for message in messages]
    if not messages or speakers != (["human", "gpt"] * len(messages))[: len(messages)]:
        raise UserError(f'"conversations": human and gpt must take turns, found {shortened(repr(speakers))}')
    answers = [{"answer": message.get("value")} for message in messages[1::2]] + [{}]
    return [{"question": human.get("value")} | answer for human, answer in zip(messages[::2], answers, strict=False)]


def _text(item: dict[str, Any], name: str, where: str) -> str:
    """Return the question or answer of a turn, also under its first letter; the first of several answers."""
    value = item.get(name, item.get(name[0]))
    if name == "answer" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}"{name}" must be a text, found {shortened(repr(value))}')
    check_text(value, f'"{name}"')
    if name == "question" and IMAGE_WORD in value and IMAGE_TAG in value:
        raise UserError(f'"question" has {IMAGE_TAG} beside {IMAGE_WORD}: take it out')
    return value


def photo_names(item: dict[str, Any]) -> list[str]:
    """Return the photo files of a row or turn: `image` or `images`, else `image_id`.

    Raises:
        UserError: one is no text, or both fields name different photos.
    """
    values = [item[field] for field in ("image", "images") if item.get(field) not in (None, [])]
    if not values and item.get("image_id") is not None:
        values = [item["image_id"]]
    named = [value if isinstance(value, list) else [value] for value in values]
    for name in (name for names in named for name in names):
        if not isinstance(name, str) or not name:
            raise UserError(f'"image" must be a file name or a list of them, found {shortened(repr(name))}')
    if named[1:] and named[0] != named[1]:
        raise UserError(f'"image" and "images" name different photos: {shortened(repr(named))}')
    return named[0] if named else []
