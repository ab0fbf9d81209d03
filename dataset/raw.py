"""Readers of raw annotations: rows of five public formats → photos and questions in the form of `dataset/records.py`.

`process_image.py` selects a reader from `READERS` by `format` and re-exports `process_ali` and `process_coco`.
`Report` stores every rejected row with a reason; no row is lost silently.
"""

import functools
import itertools
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import IMAGE_TAG
from dataset.formats import Loader, load_coco_captions, load_jsonl, load_list, load_vqav2
from dataset.photo_check import Check
from dataset.records import TEXT_KEY, Captions, ImageMap
from dataset.rows import DropRowError, Report, Row, RowPart, shown
from dataset.turns import (
    Notes,
    Turns,
    answers_of,
    box_of,
    dialogue,
    image_names,
    kind_of,
    place_by_turn,
    place_photos,
    turn_of,
)
from paths import resolve_path
from visual.region import Box

CHINESE_QUESTIONS = (f"这幅图像描述了什么？{IMAGE_TAG}", f"{IMAGE_TAG}这幅图像中有什么？")
ENGLISH_QUESTIONS = (f"What does this picture show?{IMAGE_TAG}", f"{IMAGE_TAG}What is in this picture?")
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")


def process_ali(
    rows: Iterable[Any],
    image_path: str | Path,
    start_ID: int,
    *,
    image_map: ImageMap | None = None,
    seed: int = 0,
    source: str = "ai_challenger",
    report: Report | None = None,
    check: Check | None = None,
    questions: tuple[str, str] | None = CHINESE_QUESTIONS,
) -> tuple[ImageMap, Captions]:
    """Read rows of captioned photos: photos under `image_id` or `image`, texts under `caption` or `conversations`.

    All captions of a row that are not blank become answers to one of two questions, each with probability 1/2.

    Args:
        rows: the parsed annotations, or the result of a loader of `dataset/formats.py`.
        image_path: folder of the photos; a relative path starts at the repository root.
        start_ID: ID of the first new photo = number of photos before it.
        image_map: photos of earlier sources; they keep their IDs.
        seed: seed of the choice of questions.
        source: name in each entry, and prefix of a key that another photo already has.
        report: filled with the counts and the rejected rows.
        check: called once with the paths of the new photos; rows with a photo in its result are dropped.
        questions: the two questions; None: in the language of the captions, Chinese or English.

    Returns:
        The new photos only, and the captions of these rows (`merge_captions` adds them to those of other sources).

    Raises:
        ValueError: `start_ID` is not the number of photos in `image_map`.
    """
    choice = random.Random(seed)

    def parse(row: dict[str, Any], notes: Notes) -> Turns:
        names = image_names(row)
        if not names:
            raise DropRowError("no photo named", f"keys {', '.join(map(str, row))}")
        texts = row.get("caption", row.get("conversations"))
        if isinstance(texts, list) and texts and isinstance(texts[0], dict):
            return place_photos(dialogue(texts, notes), names, notes)
        answers = answers_of(texts, notes)
        language = questions or (CHINESE_QUESTIONS if CHINESE_CHARACTER.search(answers[0]) else ENGLISH_QUESTIONS)
        question = language[choice.random() < 0.5]
        return [{"q": question.replace(IMAGE_TAG, IMAGE_TAG * len(names)), "a": answers, "images": names}]

    return _process(parse, rows, image_path, start_ID, image_map, source, report, check)


def process_captions(
    rows: Iterable[Any], image_path: str | Path, start_ID: int, **options: Any
) -> tuple[ImageMap, Captions]:
    """Read rows as `process_ali`, with questions in the language of the captions."""
    return process_ali(rows, image_path, start_ID, questions=None, **options)


def process_coco(
    rows: Iterable[Any],
    image_path: str | Path,
    start_ID: int,
    *,
    image_map: ImageMap | None = None,
    seed: int = 0,
    source: str = "coco",
    report: Report | None = None,
    check: Check | None = None,
) -> tuple[ImageMap, Captions]:
    """Read rows with `conversations` (LLaVA), with `turns`, or with `question`/`q` and `answer`/`a`.

    `dataset/turns.py` defines the positions of the photos; a row without photo is text only. `seed` is not used; it
    gives all readers the same signature. Arguments as in `process_ali`.
    """

    def parse(row: dict[str, Any], notes: Notes) -> Turns:
        names = image_names(row)
        if "turns" in row and "conversations" not in row:
            return place_by_turn(row["turns"], names, notes, box_of(row))
        turns = dialogue(row["conversations"], notes) if "conversations" in row else [turn_of(row, notes)]
        turns[0] |= box_of(row)
        return place_photos(turns, names, notes)

    return _process(parse, rows, image_path, start_ID, image_map, source, report, check)


def merge_captions(captions: Captions, new: Captions) -> None:
    """Add `new` to `captions` in place; a photo in both keeps all its entries."""
    for key, entries in new.items():
        captions.setdefault(key, []).extend(entries)


def _process(
    parse: Callable[[dict[str, Any], Notes], Turns],
    rows: Iterable[Any],
    image_path: str | Path,
    start_ID: int,
    image_map: ImageMap | None,
    source: str,
    report: Report | None,
    check: Check | None,
) -> tuple[ImageMap, Captions]:
    if image_map is not None and start_ID != len(image_map):
        raise ValueError(f"source '{source}': start_ID is {start_ID} but {len(image_map)} photos stand before it")
    report = Report(source) if report is None else report
    register = _Register(image_path, source, start_ID, image_map or {})
    parsed = _parse_rows(parse, rows, report)
    problems = {}
    if check is not None:
        named = dict.fromkeys(path for _, _, turns, _ in parsed for path in register.paths(turns))
        problems = check([path for path in named if not register.knows(path)])

    captions: Captions = {}
    for number, row, turns, notes in parsed:
        bad = next((path for path in register.paths(turns) if path in problems), None)
        if bad is not None:
            report.drop(_parts(number, row), *problems[bad])
            continue
        entry = {"source": source} | kind_of(row.value if isinstance(row, Row) else row)
        key = register.enter(turns, entry)
        entry |= turns[0] if len(turns) == 1 else {"turns": turns}
        captions.setdefault(key, []).append(entry)
        if report.kept_rows is not None:
            report.kept_rows.setdefault(key, []).append(row)
        report.kept += len(row.parts) if isinstance(row, Row) else 1
        report.questions += len(turns)
        for name, count in (notes or {}).items():
            setattr(report, name, getattr(report, name) + count)
    report.photos += len(register.new)
    return register.new, captions


def _parse_rows(
    parse: Callable[[dict[str, Any], Notes], Turns], rows: Iterable[Any], report: Report
) -> list[tuple[int, Any, Turns, Notes | None]]:
    """Return (number, row, turns, notes) of each usable row; the report gets the other rows."""
    parsed = []
    for number, row in enumerate(rows, start=1):
        report.rows += len(row.parts) if isinstance(row, Row) else 1
        notes: Notes = {}
        try:
            if isinstance(row, Row) and row.problem is not None:
                raise row.problem
            value = row.value if isinstance(row, Row) else row
            if not isinstance(value, dict):
                raise DropRowError("row is not an object", shown(value))
            parsed.append((number, row, parse(value, notes), notes or None))
        except DropRowError as problem:
            report.drop(_parts(number, row), problem.reason, problem.detail)
    return parsed


def _parts(number: int, row: Any) -> tuple[RowPart, ...]:
    return row.parts if isinstance(row, Row) else (RowPart(f"row {number}", row),)


class _Register:
    """IDs and keys of the photos and regions of a source. Absolute path and box identify a known one, not its key."""

    def __init__(self, image_path: str | Path, source: str, start_ID: int, known: ImageMap) -> None:
        self.folder = Path(image_path).as_posix()
        self.folder_name = Path(os.path.abspath(resolve_path(image_path))).name or source
        self.source = source
        self.start_ID = start_ID
        self.known = known
        self.new: ImageMap = {}
        self.ID_of_known_file = {
            (_absolute(photo["path"]), _suffix(photo.get("box"))): photo["ID"] for photo in known.values()
        }
        self.ID_of_path: dict[tuple[str, str], int] = {}

    def paths(self, turns: Turns) -> list[str]:
        """Return the photo files of a row, in reading order."""
        return [f"{self.folder}/{name}" for turn in turns for name in turn.get("images", ())]

    def enter(self, turns: Turns, entry: dict[str, Any]) -> str:
        """Replace photo names by IDs, as `write_records` describes; return the key of `entry` in captions."""
        IDs: list[list[int]] = []
        path = ""
        for turn in turns:
            IDs.append([self.get(path := own) for own in self.paths([turn])])
            if "box" in turn:
                IDs[-1].append(self.get(path, turn.pop("box")))
        first = next(itertools.chain.from_iterable(IDs), None)
        if first is not None and IDs[0] != [first]:
            entry["images"] = IDs[0]
        for turn in turns:
            turn.pop("images", None)
        for turn, own in zip(turns[1:], IDs[1:], strict=True):
            if own:
                turn["images"] = own
        return TEXT_KEY if first is None else str(first)

    def knows(self, path: str) -> bool:
        return (_absolute(path), "") in self.ID_of_known_file

    def get(self, path: str, box: Box | None = None) -> int:
        """Return the ID of a photo, or of the region `box` of it."""
        suffix = _suffix(box)
        ID = self.ID_of_path.get((path, suffix), self.ID_of_known_file.get((_absolute(path), suffix)))
        if ID is None:
            ID = self.start_ID + len(self.new)
            name = path[len(self.folder) + 1 :]
            key = f"{self.folder_name}/{name}{suffix}"
            while key in self.known or key in self.new:
                key = f"{self.source}/{key}"
            self.ID_of_path[path, suffix] = ID
            self.new[key] = {"ID": ID, "image_file": name, "path": path} | ({} if box is None else {"box": [*box]})
        return ID


def _suffix(box: Sequence[float] | None) -> str:
    """Return what the key of a region has after that of its photo; as text, since (0, 0, 1, 1) equals (0.0, …)."""
    return "" if box is None else f"#{','.join(map(str, box))}"


def _absolute(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{_absolute_folder(folder)}/{name}"


@functools.cache
def _absolute_folder(folder: str) -> str:
    return os.path.abspath(resolve_path(folder))


class Reader(NamedTuple):
    """Functions of one format: `load` returns the rows of a source, `process` has the signature of `process_ali`."""

    load: Loader
    process: Callable[..., tuple[ImageMap, Captions]]


READERS = {
    "ai_challenger": Reader(load_list, process_ali),
    "llava": Reader(load_list, process_coco),
    "jsonl": Reader(load_jsonl, process_coco),
    "coco_captions": Reader(load_coco_captions, process_captions),
    "vqav2": Reader(load_vqav2, process_coco),
}
