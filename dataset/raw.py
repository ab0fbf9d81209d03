"""Readers of raw annotations: rows of six public formats → photos and questions in the form of `dataset/records.py`.

`process_image.py` selects a reader from `READERS` by `format` and re-exports `process_ali` and `process_coco`.
`Report` stores every rejected row with a reason; no row is lost silently.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import IMAGE_TAG
from dataset.formats import Loader, load_coco_captions, load_jsonl, load_list, load_vqav2
from dataset.photo_check import Check
from dataset.records import Captions, ImageMap
from dataset.register import MemoryRecords, Records, Register
from dataset.rows import DropRowError, Report, Row, RowPart, shown
from dataset.shards import load_shards
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

CHINESE_QUESTIONS = (f"这幅图像描述了什么？{IMAGE_TAG}", f"{IMAGE_TAG}这幅图像中有什么？")
ENGLISH_QUESTIONS = (f"What does this picture show?{IMAGE_TAG}", f"{IMAGE_TAG}What is in this picture?")
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
DIALOGUE_FIELDS = ("conversations", "turns", "question", "q")
CHUNK = 50_000  # usable rows in memory at a time, about 150 MB; their photos are checked together

Parser = Callable[[dict[str, Any], Notes], Turns]
ParsedRow = tuple[int, Any, Turns, Notes | None]  # number, row, turns, notes


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
    into: Records | None = None,
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
        check: called with the paths of new photos; rows with a photo in its result are dropped.
        into: takes photos and entries, after those of earlier sources; the results are then empty.
        questions: the two questions; None: in the language of the captions, Chinese or English.

    Returns:
        The new photos only, and the captions of these rows.

    Raises:
        ValueError: `start_ID` is not the number of photos in `image_map`.
    """
    parse = _caption_parser(seed, questions)
    return _process(parse, rows, image_path, start_ID, image_map, source, report, check, into)


def _caption_parser(seed: int, questions: tuple[str, str] | None) -> Parser:
    choice = random.Random(seed)

    def parse(row: dict[str, Any], notes: Notes) -> Turns:
        names = image_names(row)
        if not names:
            raise DropRowError("no photo named", f"keys {', '.join(map(str, row))}")
        box, texts = box_of(row), row.get("caption", row.get("conversations"))
        if isinstance(texts, list) and texts and isinstance(texts[0], dict):
            turns = dialogue(texts, notes)
            turns[0] |= box
            return place_photos(turns, names, notes)
        answers = answers_of(texts, notes)
        language = questions or (CHINESE_QUESTIONS if CHINESE_CHARACTER.search(answers[0]) else ENGLISH_QUESTIONS)
        question = language[choice.random() < 0.5]
        tags = IMAGE_TAG * (len(names) + len(box))  # the part that the captions are about is one more photo
        return [{"q": question.replace(IMAGE_TAG, tags), "a": answers, "images": names} | box]

    return parse


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
    into: Records | None = None,
) -> tuple[ImageMap, Captions]:
    """Read rows with `conversations` (LLaVA), with `turns`, or with `question`/`q` and `answer`/`a`.

    A row with none of them may have a `caption`, which is read as by `process_captions`. `dataset/turns.py` defines the
    positions of the photos; a row without photo is text only. Arguments as in `process_ali`.
    """
    parse_caption = _caption_parser(seed, None)

    def parse(row: dict[str, Any], notes: Notes) -> Turns:
        is_caption = "caption" in row and row.keys().isdisjoint(DIALOGUE_FIELDS)
        return parse_caption(row, notes) if is_caption else _parse_dialogue(row, notes)

    return _process(parse, rows, image_path, start_ID, image_map, source, report, check, into)


def _parse_dialogue(row: dict[str, Any], notes: Notes) -> Turns:
    names = image_names(row)
    if "turns" in row and "conversations" not in row:
        return place_by_turn(row["turns"], names, notes, box_of(row))
    turns = dialogue(row["conversations"], notes) if "conversations" in row else [turn_of(row, notes)]
    turns[0] |= box_of(row)
    return place_photos(turns, names, notes)


def _process(
    parse: Parser,
    rows: Iterable[Any],
    image_path: str | Path,
    start_ID: int,
    image_map: ImageMap | None,
    source: str,
    report: Report | None,
    check: Check | None,
    into: Records | None,
) -> tuple[ImageMap, Captions]:
    known = None if image_map is None else len(image_map)
    before = into.photos if into is not None else known
    if before not in (None, start_ID):
        raise ValueError(f"source '{source}': start_ID is {start_ID} but {before} photos stand before it")
    report = Report(source) if report is None else report
    memory = MemoryRecords(image_map, start_ID)
    register = Register(image_path, source, memory if into is None else into)
    parsed = _parse_rows(parse, rows, report)
    while chunk := list(itertools.islice(parsed, CHUNK)):
        _enter(chunk, register, report, check)
    report.photos += register.records.photos - start_ID
    return memory.image_map, memory.captions


def _enter(chunk: list[ParsedRow], register: Register, report: Report, check: Check | None) -> None:
    """Check the photos of the rows, then add photos and entries to the records; the report gets unusable rows."""
    problems = {}
    if check is not None:
        named = dict.fromkeys(path for _, _, turns, _ in chunk for path in register.paths(turns))
        problems = check([path for path in named if not register.knows(path)])
    for number, row, turns, notes in chunk:
        bad = next((path for path in register.paths(turns) if path in problems), None)
        if bad is not None:
            report.drop(_parts(number, row), *problems[bad])
            continue
        entry = {"source": register.source} | kind_of(row.value if isinstance(row, Row) else row)
        key = register.enter(turns, entry)
        entry |= turns[0] if len(turns) == 1 else {"turns": turns}
        register.records.add_entry(key, entry)
        if report.kept_rows is not None:
            report.kept_rows.setdefault(key, []).append(row)
        report.kept += len(row.parts) if isinstance(row, Row) else 1
        report.questions += len(turns)
        for name, count in (notes or {}).items():
            setattr(report, name, getattr(report, name) + count)


def _parse_rows(parse: Parser, rows: Iterable[Any], report: Report) -> Iterator[ParsedRow]:
    """Yield (number, row, turns, notes) of each usable row; the report gets the other rows."""
    for number, row in enumerate(rows, start=1):
        report.rows += len(row.parts) if isinstance(row, Row) else 1
        notes: Notes = {}
        try:
            if isinstance(row, Row) and row.problem is not None:
                raise row.problem
            value = row.value if isinstance(row, Row) else row
            if not isinstance(value, dict):
                raise DropRowError("row is not an object", shown(value))
            turns = parse(value, notes)
        except DropRowError as problem:
            report.drop(_parts(number, row), problem.reason, problem.detail)
        else:
            yield number, row, turns, notes or None


def _parts(number: int, row: Any) -> tuple[RowPart, ...]:
    return row.parts if isinstance(row, Row) else (RowPart(f"row {number}", row),)


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
    "webdataset": Reader(load_shards, process_coco),
}
