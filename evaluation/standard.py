"""Standard files for `eval_vqa.py`: their questions in, and the result file of a leaderboard or scorer out.

* `vqav2`: the questions file, and the annotations file if there is one; → `[{"question_id", "answer"}, …]`.
* `coco_captions`: the file of captions, one question per photo; → `[{"image_id", "caption"}, …]`, which pycocotools'
  `loadRes` reads. A file of photos without captions is a test set.
* `jsonl`: rows as `dataset/turns.py` describes; → one `{"id", "question", "answer"}` per line.

The rows are those that `process_image.py` would keep. A question of a test set has no references, so it has no score.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from dataset.formats import load_vqav2
from dataset.photo_check import photo_check
from dataset.raw import READERS
from dataset.records import Entry, Photo, entries_of, photos_of, write_files, write_json_files
from dataset.rows import Report, Row
from errors import UserError, shortened
from paths import nearest_name_hint

FORMATS = ("vqav2", "coco_captions", "jsonl")
_RESULT_KEYS = {"vqav2": ("question_id", "answer"), "coco_captions": ("image_id", "caption")}
# The readers reject a row without references, as training needs. With this text they take it, and it is removed again.
_STAND_IN = dict.fromkeys(("answer", "caption"), "?")


def read_standard(
    format_name: str, annotations: Sequence[Path], images: Path
) -> tuple[dict[int, Photo], list[Entry], Report]:
    """Read the questions of standard files; nothing is written.

    Args:
        format_name: one of `FORMATS`.
        annotations: one file; for `vqav2` the questions file and, except for a test set, its annotations file.
        images: folder of the photos.

    Returns:
        Photos by ID and entries, as `dataset.records.read_records` returns them, and the report with all rejected rows.
        The source is named after the format, that of `jsonl`, which may hold any data set, after the file's folder.
        `Entry.id` is the question_id (`vqav2`), the image_id (`coco_captions`), or the `"id"` of the row and without
        one its line number (`jsonl`). In a test set, `Turn.answers` is ().

    Raises:
        UserError: a file or folder is missing or of another format, or no row is usable.
    """
    if len(annotations) not in ((1, 2) if format_name == "vqav2" else (1,)):
        raise UserError(
            f"--annotations: {len(annotations)} files for --format {format_name}: name one file, or for vqav2 the "
            "questions file and its annotations file"
        )
    if not images.is_dir():
        raise UserError(f"--images: folder not found: {shortened(images)}. {nearest_name_hint(images)}".rstrip())
    images = images.absolute()  # the readers take a relative path from the repository root
    file, *answers = annotations
    source = (file.absolute().parent.name if format_name == "jsonl" else "") or format_name
    report = Report(source, str(file), kept_rows={})
    reader = READERS[format_name]
    if format_name == "vqav2":
        rows = load_vqav2(answers[0] if answers else None, file, images, report.encodings)
    else:
        rows = reader.load(file, None, images, report.encodings)
    test_set = any(map(_lacks_references, rows))
    image_map, captions = reader.process(
        [row._replace(value=row.value | _STAND_IN, problem=None) if _lacks_references(row) else row for row in rows],
        images,
        0,
        source=source,
        report=report,
        check=photo_check("exists", source),
    )
    if not captions:
        raise UserError(_nothing_to_ask(file, report))
    photos = photos_of(image_map, file)
    assert report.kept_rows is not None, "given above"
    kept = [row for rows in report.kept_rows.values() for row in rows]
    report.kept_rows = None  # the report lives on, and raw rows need far more memory than entries
    entries = [
        replace(entry, id=_identity(row))
        for entry, row in zip(entries_of(captions, file, photos, file), kept, strict=True)
    ]
    return photos, list(map(_without_references, entries)) if test_set else entries, report


def _lacks_references(row: Row) -> bool:
    return row.value is not None and row.problem is not None


def _without_references(entry: Entry) -> Entry:
    return replace(entry, turns=tuple(replace(turn, answers=()) for turn in entry.turns))


def _identity(row: Row) -> int | str:
    given = row.value.get("id")
    if type(given) is int or (isinstance(given, str) and given):  # True is an int as well
        return given
    return int(row.parts[0].place.removeprefix("line "))  # only a row of jsonl may have no id


def _nothing_to_ask(file: Path, report: Report) -> str:
    if not report.dropped:
        return f"{file}: there are no rows in it: fetch it again"
    reason, most = max(report.dropped.items(), key=lambda item: item[1]["count"])
    return (
        f"{file}: none of its {report.rows:,} rows is usable, mostly: {reason} ({most['count']:,}, for example "
        f"{most['examples'][0]}): mend the rows, or change --format, --annotations or --images"
    )


def write_results(format_name: str, file: Path, answers: Iterable[tuple[int | str | None, str, str]]) -> None:
    """Write the result file, completely or not at all; answers are stripped, but not normalised: the scorers do that.

    Args:
        answers: `Entry.id`, question and answer; the file has their order. The turns of a dialogue have one id.

    Raises:
        UserError: the file cannot be written.
    """
    if format_name == "jsonl":
        rows: Iterable[Any] = ({"id": ID, "question": asked, "answer": text.strip()} for ID, asked, text in answers)
        write_files({file: (orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)})
        return
    id_key, text_key = _RESULT_KEYS[format_name]
    rows = [{id_key: ID, text_key: text.strip()} for ID, _, text in answers]
    assert len({row[id_key] for row in rows}) == len(rows), "one answer for each question or photo"
    write_json_files({file: rows})
