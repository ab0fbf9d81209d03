"""Readers of raw annotations: five public formats → photos and questions in the form of `dataset/records.py`.

`process_image.py` finds them in `READERS` by the config's `format` and re-exports `process_ali` and `process_coco`.
A row that cannot be used is dropped with a reason, which `Report` counts; nothing goes silently.
"""

import functools
import os
import posixpath
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from config import IMAGE_TAG
from dataset.json_files import read_json, read_jsonl
from dataset.records import TEXT_KEY, Captions, ImageMap
from errors import UserError
from paths import resolve_path

IMAGE_WORD = "<image>"  # the photo's place in LLaVA annotations
CHINESE_QUESTIONS = (f"这幅图像描述了什么？{IMAGE_TAG}", f"{IMAGE_TAG}这幅图像中有什么？")
ENGLISH_QUESTIONS = (f"What does this picture show?{IMAGE_TAG}", f"{IMAGE_TAG}What is in this picture?")
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
EXAMPLES = 3

Parsed = tuple[list[str], list[dict[str, Any]]]  # names of the photos, turns
Check = Callable[[list[str]], dict[str, tuple[str, str]]]  # photo paths -> {path to drop: (reason, detail)}


@dataclass
class Report:
    """What became of one source's rows: `rows` = `kept` + all `dropped`."""

    source: str
    rows: int = 0
    kept: int = 0
    photos: int = 0  # new ones, not named by an earlier source
    questions: int = 0
    tags_added: int = 0  # rows that named a photo but no place for it; it came first
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "examples"}

    def drop(self, reason: str, example: str) -> None:
        """Count one row; the first three of a reason are shown as examples."""
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(example if len(example) <= 200 else example[:199] + "…")


class _DropRowError(Exception):
    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, str(detail)


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
    """Rows of captioned photos: the photo under `image_id` or `image`, texts under `caption` or `conversations`.

    All captions of a row that are not blank become answers to one of two questions, each with probability 1/2.

    Args:
        rows: the parsed annotations.
        image_path: folder of the photos; a relative one counts from the repository root.
        start_ID: ID of the first new photo = number of photos before it.
        image_map: photos of earlier sources; those keep their IDs.
        seed: of the choice of questions.
        source: goes into each entry, and in front of a key that is taken by another photo.
        report: is filled.
        check: called once with the paths of the new photos; rows of a photo it gives back are dropped.
        questions: the two questions; None asks in the language of the captions, Chinese or English.

    Returns:
        The new photos only, and the captions of these rows (`merge_captions` adds them to those of other sources).

    Raises:
        ValueError: `start_ID` is not the number of photos in `image_map`.
    """
    choice = random.Random(seed)

    def parse(row: dict[str, Any], report: Report) -> Parsed:
        names = _image_names(row)
        if not names:
            raise _DropRowError("no photo named", f"keys {', '.join(map(str, row))}")
        texts = row.get("caption", row.get("conversations"))
        if isinstance(texts, list) and texts and isinstance(texts[0], dict):
            return names, _place_tags(_dialogue(texts), len(names), report)
        answers = _answers(texts)
        language = questions or (CHINESE_QUESTIONS if CHINESE_CHARACTER.search(answers[0]) else ENGLISH_QUESTIONS)
        question = language[choice.random() < 0.5]
        return names, [{"q": question.replace(IMAGE_TAG, IMAGE_TAG * len(names)), "a": answers}]

    return _process(parse, rows, image_path, start_ID, image_map, source, report, check)


def process_captions(
    rows: Iterable[Any], image_path: str | Path, start_ID: int, **options: Any
) -> tuple[ImageMap, Captions]:
    """As `process_ali`, asked in the language of the captions."""
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
    """Rows with `conversations` (LLaVA) or with `question`/`q` and `answer`/`a`; arguments as in `process_ali`.

    `<image>` becomes `<|extra_0|>`, all turns are kept, a row without photo is text only. Nothing is drawn at random:
    `seed` is there so that all readers are called alike.
    """

    def parse(row: dict[str, Any], report: Report) -> Parsed:
        names = _image_names(row)
        if "conversations" in row:
            turns = _dialogue(row["conversations"])
        else:
            turns = [
                {"q": _question(row.get("question", row.get("q"))), "a": _answers(row.get("answer", row.get("a")))}
            ]
        return names, _place_tags(turns, len(names), report)

    return _process(parse, rows, image_path, start_ID, image_map, source, report, check)


def merge_captions(captions: Captions, new: Captions) -> None:
    """Add `new` to `captions` in place; a photo that stands in both keeps all its entries."""
    for key, entries in new.items():
        captions.setdefault(key, []).extend(entries)


def _process(
    parse: Callable[[dict[str, Any], Report], Parsed],
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
    parsed = []
    for number, row in enumerate(rows, start=1):
        report.rows += 1
        try:
            if not isinstance(row, dict):
                raise _DropRowError("row is not an object", repr(row))
            names, turns = parse(row, report)
            parsed.append((number, [f"{register.folder}/{name}" for name in names], turns, row.get("type")))
        except _DropRowError as drop:
            report.drop(drop.reason, f"row {number}: {drop.detail}")
    problems = {}
    if check is not None:
        named = dict.fromkeys(path for _, paths, _, _ in parsed for path in paths)
        problems = check([path for path in named if not register.knows(path)])

    captions: Captions = {}
    for number, paths, turns, kind in parsed:
        bad = next((path for path in paths if path in problems), None)
        if bad is not None:
            reason, detail = problems[bad]
            report.drop(reason, f"row {number}: {detail}")
            continue
        IDs = [register.get(path) for path in paths]
        entry: dict[str, Any] = {"source": source}
        if kind is not None:
            entry["type"] = str(kind)
        if len(IDs) > 1:
            entry["images"] = IDs
        entry |= turns[0] if len(turns) == 1 else {"turns": turns}
        captions.setdefault(str(IDs[0]) if IDs else TEXT_KEY, []).append(entry)
        report.kept += 1
        report.questions += len(turns)
    report.photos += len(register.new)
    return register.new, captions


class _Register:
    """Gives each photo of a source its ID and key. The file decides whether a photo is a known one, not its name."""

    def __init__(self, image_path: str | Path, source: str, start_ID: int, known: ImageMap) -> None:
        self.folder = Path(image_path).as_posix()
        self.folder_name = Path(os.path.abspath(resolve_path(image_path))).name or source
        self.source = source
        self.start_ID = start_ID
        self.known = known
        self.new: ImageMap = {}
        self.ID_of_known_file = {_absolute(photo["path"]): photo["ID"] for photo in known.values()}
        self.ID_of_path: dict[str, int] = {}

    def knows(self, path: str) -> bool:
        return _absolute(path) in self.ID_of_known_file

    def get(self, path: str) -> int:
        ID = self.ID_of_path.get(path, self.ID_of_known_file.get(_absolute(path)))
        if ID is None:
            ID = self.start_ID + len(self.new)
            name = path[len(self.folder) + 1 :]
            key = f"{self.folder_name}/{name}"
            while key in self.known or key in self.new:
                key = f"{self.source}/{key}"
            self.ID_of_path[path] = ID
            self.new[key] = {"ID": ID, "image_file": name, "path": path}
        return ID


def _absolute(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{_absolute_folder(folder)}/{name}"


@functools.cache
def _absolute_folder(folder: str) -> str:
    return os.path.abspath(resolve_path(folder))


def _image_names(row: dict[str, Any]) -> list[str]:
    value = row.get("image")
    if value is None:
        value = row.get("image_id")
    if value is None:
        return []
    return [_safe_name(name) for name in (value if isinstance(value, list) else [value])]


def _safe_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise _DropRowError("photo name is not a file name", repr(name))
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith(("/", "../")) or clean in (".", "..") or clean[1:2] == ":":
        raise _DropRowError("photo path leaves the image folder", name)
    return clean


def _dialogue(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise _DropRowError("conversations is not a list of messages", repr(messages))
    speakers = [message.get("from") for message in messages]
    if speakers != ["human", "gpt"] * (len(messages) // 2):
        raise _DropRowError("human and gpt do not take turns", ", ".join(map(str, speakers)))
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return [{"q": _question(human.get("value")), "a": _answers(gpt.get("value"))} for human, gpt in pairs]


def _question(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _DropRowError("no question", repr(value))
    _refuse_literal_tag(value)
    return value


def _answers(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if any(not isinstance(text, str) for text in texts):
        raise _DropRowError("no answer" if value is None else "answer is not text", repr(value))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise _DropRowError("no answer", repr(value))
    for text in texts:
        _refuse_literal_tag(text)
    return texts


def _refuse_literal_tag(text: str) -> None:
    if IMAGE_TAG in text:
        raise _DropRowError(f"text holds a literal {IMAGE_TAG}", text)


def _place_tags(turns: list[dict[str, Any]], photos: int, report: Report) -> list[dict[str, Any]]:
    first, tags = turns[0], sum(turn["q"].count(IMAGE_WORD) for turn in turns)
    if tags == 0 and photos:
        first["q"] = IMAGE_TAG * photos + "\n" + first["q"]
        report.tags_added += 1
    elif tags != photos:
        raise _DropRowError(f"number of {IMAGE_WORD} tags is not that of photos", f"{tags} tags, {photos} photos")
    elif first["q"].count(IMAGE_WORD) != photos:
        raise _DropRowError(f"{IMAGE_WORD} stands in a later question", first["q"])
    else:
        first["q"] = first["q"].replace(IMAGE_WORD, IMAGE_TAG)
    return turns


def _load_rows(annotations: Path, questions: Path | None, images: Path) -> list[Any]:
    rows = read_json(annotations)
    if not isinstance(rows, list):
        raise UserError(f"{annotations}: expected a list of rows, found {type(rows).__name__}: is 'format' right?")
    return rows


def _load_jsonl(annotations: Path, questions: Path | None, images: Path) -> list[Any]:
    return read_jsonl(annotations)


def _load_coco_captions(annotations: Path, questions: Path | None, images: Path) -> list[Any]:
    data = read_json(annotations)
    photos = _objects(data, "images", annotations)
    rows = {str(photo.get("id")): {"image": photo.get("file_name"), "caption": []} for photo in photos}
    for item in _objects(data, "annotations", annotations):
        row = rows.setdefault(str(item.get("image_id")), {"caption": []})
        row["caption"].append(item.get("caption"))
    return list(rows.values())


def _load_vqav2(annotations: Path, questions: Path | None, images: Path) -> list[Any]:
    assert questions is not None, "the config demands the file for this format"
    asked = read_json(questions)
    rows: dict[str, dict[str, Any]] = {}
    for item in _objects(asked, "questions", questions):
        rows[str(item.get("question_id"))] = {"image": item.get("image_id"), "question": item.get("question")}
    for item in _objects(read_json(annotations), "annotations", annotations):
        row = rows.setdefault(str(item.get("question_id")), {"image": item.get("image_id")})
        row["answer"] = [answer.get("answer") for answer in _objects(item, "answers", annotations)]
        row["type"] = item.get("answer_type")
    numbered = [row for row in rows.values() if isinstance(row["image"], int)]
    # a photo is called 000000000009.jpg in COCO 2017 and COCO_train2014_000000000009.jpg in COCO 2014
    plain = any((images / f"{row['image']:012}.jpg").is_file() for row in numbered[:100])
    prefix = "" if plain else f"COCO_{asked.get('data_subtype', images.name)}_"
    for row in numbered:
        row["image"] = f"{prefix}{row['image']:012}.jpg"
    return list(rows.values())


def _objects(data: Any, name: str, path: Path) -> list[dict[str, Any]]:
    items = data.get(name) if isinstance(data, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{path}: expected an object with a list of objects '{name}': is 'format' right?")
    return items


class Reader(NamedTuple):
    """`load(annotations, questions, images)` gives the rows of a source, `process` is called as `process_ali`."""

    load: Callable[[Path, Path | None, Path], list[Any]]
    process: Callable[..., tuple[ImageMap, Captions]]


READERS = {
    "ai_challenger": Reader(_load_rows, process_ali),
    "llava": Reader(_load_rows, process_coco),
    "jsonl": Reader(_load_jsonl, process_coco),
    "coco_captions": Reader(_load_coco_captions, process_captions),
    "vqav2": Reader(_load_vqav2, process_coco),
}
