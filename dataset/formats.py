"""Loaders of annotation files in public formats; `dataset/raw.py` converts their rows to photos and questions.

Definition of a row, with kept + rejected = read:

* `ai_challenger`, `llava`: an item of the list.
* `jsonl`: a line that is not blank. It is read line by line, so it can be larger than the memory.
* `coco_captions`: an item of `annotations`, that is, a caption. Also an item of `images` that has no caption, has no
  id or repeats an earlier id. All captions of a photo become one entry with several answers. A file without
  `annotations` is a test set: each of its photos is a row without references.
* `vqav2`: an item of `questions`, with its annotation. Also an item of `annotations` without a question of its own.
  Without a file of annotations, the questions are a test set.
* `webdataset`: a sample (`dataset/shards.py`).

`dataset/turns.py` has examples of `llava` and `jsonl` rows with several turns and photos.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.json_files import parse_json, read_content, utf8_start
from dataset.rows import DropRowError, Row, RowPart, check_text, shown
from errors import UserError, file_error, shortened

# Arguments: paths of annotations, questions (vqav2 only) and photos, and a dict for the encoding of each file that is
# not UTF-8. Returns `Row`s, or the unchanged items of a list, which are row 1, row 2, …
Loader = Callable[[Path, Path | None, Path, dict[str, str]], Iterable[Any]]

WHOLE = 64 * 2**20  # bytes; a longer file of jsonl is read line by line if it is UTF-8


def load_list(annotations: Path, questions: Path | None, images: Path, encodings: dict[str, str]) -> list[Any]:
    rows = _read(annotations, encodings)
    if not isinstance(rows, list):
        raise UserError(f"{annotations}: expected a list of rows, found {type(rows).__name__}: is 'format' right?")
    return rows


def load_jsonl(annotations: Path, questions: Path | None, images: Path, encodings: dict[str, str]) -> Iterable[Row]:
    if annotations.is_file() and annotations.stat().st_size > WHOLE:
        start = utf8_start(annotations)
        if start is not None:
            return _LongFile(annotations, start)
    return list(_json_lines(_text(annotations, encodings).split(b"\n"), annotations))


class _LongFile:
    """Rows of a jsonl file in UTF-8 that are read and parsed one by one, each time they are iterated."""

    def __init__(self, file: Path, start: int) -> None:
        self.file, self.start = file, start

    def __iter__(self) -> Iterator[Row]:
        try:
            with open(self.file, "rb") as lines:
                lines.seek(self.start)
                yield from _json_lines(lines, self.file)
        except OSError as error:
            raise file_error(error, self.file) from error


def _json_lines(lines: Iterable[bytes], file: Path) -> Iterator[Row]:
    problem, usable = "", False
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix(b"\n")
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = parse_json(line, str(file), number)
        except UserError as error:
            broken = RowPart(place, line.decode("utf-8", errors="backslashreplace"))
            row = Row(None, (broken,), DropRowError("line is not JSON", error))
        else:
            row = Row(value, (RowPart(place, value),))
            usable = usable or isinstance(value, dict)
        if not usable and not problem:
            problem = row.problem.detail if row.problem else f"the first is {shortened(shown(row.value))}"
        yield row
    if not usable:
        raise UserError(f"{file}: no line holds a JSON object ({problem}): is 'format' right?")


@dataclass(slots=True)
class _CocoPhoto:
    part: RowPart
    named: bool = False  # at least one caption has its id
    ambiguous: bool = False  # another file has the same id
    captions: list[RowPart] = field(default_factory=list)


def load_coco_captions(annotations: Path, questions: Path | None, images: Path, encodings: dict[str, str]) -> list[Row]:
    data = _read(annotations, encodings)
    rows: list[Row] = []
    photos: dict[str, _CocoPhoto] = {}
    for part in _parts(data, "images", annotations):
        try:
            key = _id(part, "id")
            photo = photos.setdefault(key, _CocoPhoto(part))
            if photo.part is not part:
                photo.ambiguous |= part.content.get("file_name") != photo.part.content.get("file_name")
                raise DropRowError("photo id is given twice", key)
        except DropRowError as problem:
            rows.append(Row(None, (part,), problem))
    test_set = "annotations" not in data
    for part in () if test_set else _parts(data, "annotations", annotations):
        try:
            photo = photos.get(key := _id(part, "image_id"))
            if photo is None:
                raise DropRowError("caption of a photo that is not in 'images'", key)
            photo.named = True
            if photo.ambiguous:
                raise DropRowError("caption of a photo id that two photos have", key)
            check_text(part.content.get("caption"), "answer")
            photo.captions.append(part)
        except DropRowError as problem:
            rows.append(Row(None, (part,), problem))
    for photo in photos.values():
        name = photo.part.content.get("file_name")
        value = {"id": photo.part.content["id"], "image": name}
        if photo.captions:
            value["caption"] = [part.content["caption"] for part in photo.captions]
            rows.append(Row(value, tuple(photo.captions)))
        elif not photo.named:
            problem = DropRowError("photo without caption", shown(name))
            rows.append(Row(value if test_set and not photo.ambiguous else None, (photo.part,), problem))
    return rows


QUESTION_FIELDS = ("image_id", "question")  # items of one question_id with equal fields are the same question


@dataclass(slots=True)
class _VqaQuestion:
    part: RowPart
    ambiguous: bool = False  # another question has the same id
    annotation: RowPart | None = None


def load_vqav2(annotations: Path | None, questions: Path | None, images: Path, encodings: dict[str, str]) -> list[Row]:
    assert questions is not None, "the config demands the file for this format"
    asked = _read(questions, encodings)
    rows: list[Row] = []
    found: dict[str, _VqaQuestion] = {}
    for part in _parts(asked, "questions", questions):
        try:
            key = _id(part, "question_id")
            question = found.setdefault(key, _VqaQuestion(part))
            if question.part is not part:
                same = all(part.content.get(name) == question.part.content.get(name) for name in QUESTION_FIELDS)
                question.ambiguous |= not same
                raise DropRowError("question_id is given twice", key)
        except DropRowError as problem:
            rows.append(Row(None, (part,), problem))
    answered = () if annotations is None else _parts(_read(annotations, encodings), "annotations", annotations)
    for part in answered:
        try:
            question = found.get(key := _id(part, "question_id"))
            if question is None:
                raise DropRowError("annotation without question", key)
            if question.annotation is not None:
                raise DropRowError("second annotation of a question", key)
            question.annotation = part
        except DropRowError as problem:
            rows.append(Row(None, (part,), problem))
    name = _photo_namer(asked, [question.part.content.get("image_id") for question in found.values()], images)
    return rows + [_vqav2_row(question, name, annotations is None) for question in found.values()]


def _vqav2_row(question: _VqaQuestion, photo_name: Callable[[Any], Any], test_set: bool) -> Row:
    item, annotation = question.part.content, question.annotation
    content = {"question": item} | ({"annotation": annotation.content} if annotation else {})
    parts = (question.part._replace(content=content),)
    image = item.get("image_id")
    value = {"id": item["question_id"], "image": photo_name(image), "question": item.get("question")}
    try:
        if question.ambiguous:
            raise DropRowError("question_id of two different questions", item["question_id"])
        if annotation is None:
            problem = DropRowError("question without annotation", item["question_id"])
            return Row(value if test_set else None, parts, problem)
        if annotation.content.get("image_id", image) != image:
            raise DropRowError("question and annotation name different photos", item["question_id"])
        answers = annotation.content.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise DropRowError("answers is not a list of objects", shown(answers))
    except DropRowError as problem:
        return Row(None, parts, problem)
    value |= {
        "answer": [answer.get("answer") for answer in answers],
        "type": annotation.content.get("answer_type"),
    }
    return Row(value, parts)


def _photo_namer(asked: dict[str, Any], IDs: list[Any], images: Path) -> Callable[[Any], Any]:
    """Return the function from image_id to file name.

    COCO 2017 uses 000000000009.jpg, COCO 2014 uses COCO_train2014_000000000009.jpg.
    """
    numbers = [ID for ID in IDs if type(ID) is int]
    plain = any((images / f"{ID:012}.jpg").is_file() for ID in numbers[:100])
    prefix = "" if plain else f"COCO_{asked.get('data_subtype', images.name)}_"
    return lambda ID: f"{prefix}{ID:012}.jpg" if type(ID) is int else ID


def _text(file: Path, encodings: dict[str, str]) -> bytes:
    content = read_content(file)
    if content.encoding != "UTF-8":
        encodings[str(file)] = content.encoding
    return content.text


def _read(file: Path, encodings: dict[str, str]) -> Any:
    return parse_json(_text(file, encodings), str(file))


def _parts(data: Any, name: str, path: Path) -> Iterator[RowPart]:
    items = data.get(name) if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise UserError(f"{path}: expected an object with a list of objects '{name}': is 'format' right?")
    for number, item in enumerate(items, start=1):
        yield RowPart(f"{name.removesuffix('s')} {number}", item, str(path))


def _id(part: RowPart, name: str) -> str:
    if not isinstance(part.content, dict):
        raise DropRowError("row is not an object", shown(part.content))
    value = part.content.get(name)
    if type(value) is not int and not (isinstance(value, str) and value):
        raise DropRowError(f"{name} is not a number or a text", shown(value))
    return str(value)
