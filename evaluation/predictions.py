"""The file `predictions.jsonl` of an evaluation: one line for each answer, written as soon as it is there.

The first line holds the settings that the answers depend on. An evaluation that was killed and is started again reads
its answers from here; other passes (`--hard`, more baselines) are added to the same file. The majority answers are not
in it, because no model gives them.
"""

import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import orjson

from config import Prompt
from errors import UserError, file_error
from evaluation.runner import Answer

FILE = "predictions.jsonl"


class Given(NamedTuple):
    """What a model answered."""

    text: str
    finish_reason: str


Replies = dict[tuple[int, int], Given]  # by entry and turn


class Predictions:
    """Answers of this and of earlier runs with the same settings; a context manager, which closes the file.

    Args:
        folder: of the file; it is made if it is missing. A file with other settings is moved aside.
        settings: of `passes.describe`; values that JSON can hold.

    Attributes:
        replies: pass → answers that the file already had.
        note: a sentence for the user about an older file; "" if there was none.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file = folder / FILE
        self.note = ""
        self.replies: dict[str, Replies] = {}
        self._settings = orjson.loads(orjson.dumps(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found, replies, end = _read(self.file)
            if found is not None:  # keys that are newer than the file had today's values
                if "prompt" in found:
                    found["prompt"] = Prompt().model_dump(mode="json") | found["prompt"]
                if "photos" in self._settings:
                    found.setdefault("photos", self._settings["photos"])
            if found == self._settings:
                self.replies = replies
                os.truncate(self.file, end)  # the last line may be half written
            elif end:
                self.note = self._set_aside(found)
            self._mode = "ab" if found == self._settings else "wb"
        except OSError as error:
            raise file_error(error, self.file) from error

    def _set_aside(self, found: dict[str, Any] | None) -> str:
        number = 1
        while (aside := self.file.with_name(f"{self.file.stem}.old-{number}{self.file.suffix}")).exists():
            number += 1
        self.file.rename(aside)
        if found is None:
            return f"{self.file} has no settings in its first line and is now {aside.name}"
        changed = [name for name in self._settings | found if self._settings.get(name) != found.get(name)]
        return f"{self.file} was made with other settings ({', '.join(changed)}) and is now {aside.name}"

    def add(self, name: str, answer: Answer, photo_keys: list[str]) -> None:
        """Append an answer of the pass `name`.

        Raises:
            UserError: the disk is full.
        """
        line: dict[str, Any] = {"pass": name, **asdict(answer), "photos": photo_keys}
        del line["images"]  # IDs hold for one image map only
        try:
            self._append(line)
        except OSError as error:
            raise file_error(error, self.file) from error

    def _append(self, line: dict[str, Any]) -> None:
        self._stream.write(orjson.dumps(line) + b"\n")
        self._stream.flush()

    def __enter__(self) -> "Predictions":
        try:
            self._stream = open(self.file, self._mode)
            if self._mode == "wb":
                self._append({"settings": self._settings})
        except OSError as error:
            raise file_error(error, self.file) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()
        except OSError as failed:  # it tries again to write what did not fit
            if error is None:
                raise file_error(failed, self.file) from failed


def read_predictions(file: Path) -> tuple[dict[str, Any], dict[str, Replies]]:
    """Read the settings and the answers of each pass.

    Raises:
        UserError: the file cannot be read, or has no settings.
    """
    try:
        settings, replies, _ = _read(file)
    except OSError as error:
        raise file_error(error, file) from error
    if settings is None:
        raise UserError(f"{file} has no answers of an evaluation: run eval_vqa.py again")
    return settings, replies


def _read(file: Path) -> tuple[dict[str, Any] | None, dict[str, Replies], int]:
    """Read the settings, the answers of each pass, and the length of the whole lines; broken lines are left out."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None, {}, 0
    end = content.rfind(b"\n") + 1
    settings: dict[str, Any] | None = None
    replies: dict[str, Replies] = {}
    for line in content[:end].splitlines():
        try:
            match orjson.loads(line):
                case {"settings": dict(found)}:
                    settings = found
                case {
                    "pass": str(name), "entry": int(entry), "turn": int(turn), "answer": str(text),
                    "finish_reason": str(reason),
                }:  # fmt: skip
                    replies.setdefault(name, {})[entry, turn] = Given(text, reason)
        except orjson.JSONDecodeError:
            continue
    return settings, replies, end
