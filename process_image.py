"""Convert the raw annotations that the config names to `image_map.json` and `captions.json`.

    python process_image.py                                       # the sources of config.yaml
    python process_image.py --config configs/demo.yaml --check    # only print what would be kept and rejected
    python process_image.py data.check_images=open                # decode every photo too

Prints what was kept, what was rejected and why. Beside the captions it writes the same to `process_report.json`, and
every rejected row whole to `rejected.jsonl`, one JSON object a line: source, file, place, reason, detail and the row.
`dataset/formats.py` says what a row of each format is.

If `data.image_map` and `data.captions` end in `.sqlite`, the records stay on the disk while they are made
(`dataset/disk_records.py`): for millions of rows, in the formats jsonl and webdataset, which are read row by row.

If a source loses a larger share of its rows than `data.max_rejected`, only these two files are written and the exit
status is 1, so that nothing is trained on incomplete data unnoticed.
"""

import contextlib
import gc
import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path

from cli import run_script, script_arguments

from tqdm import tqdm

from config import Data, Source, load_data
from dataset.disk_records import on_disk
from dataset.disk_writer import DiskRecords
from dataset.json_files import read_json
from dataset.photo_check import photo_check
from dataset.raw import READERS, process_ali, process_coco
from dataset.records import Captions, ImageMap, json_pieces, write_files, write_records
from dataset.register import MemoryRecords
from dataset.rows import Report, report_text
from errors import UserError, file_error
from paths import Kind, address, existing_path, resolve_path, shown_path

__all__ = ["main", "process_ali", "process_coco", "process_sources", "read_json"]

REPORT_FILE = "process_report.json"
REJECTED_FILE = "rejected.jsonl"


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="print what would be kept and rejected; write nothing")
    args = parser.parse_intermixed_args(arguments)
    data = load_data(args.config, args.overrides)
    outputs = output_files(data)
    refuse_writing_over_inputs(outputs, data, resolve_path(args.config))

    image_map_path, captions_path, report_path, rejected_path = outputs.values()
    with contextlib.ExitStack() as opened:
        disk = None
        if on_disk(image_map_path, captions_path):
            disk = opened.enter_context(DiskRecords(None if args.check else captions_path.parent))
        image_map, captions, reports = process_sources(data, disk)
        print(report_text(reports))
        empty = [report.source for report in reports if report.kept == 0]
        if empty:
            raise UserError(f"no row was kept of {', '.join(empty)}, see the reasons above; nothing was written")
        excess = too_many_rejected(reports, data.max_rejected)
        if args.check:
            if excess:
                raise UserError(f"{excess} --check: nothing was written")
            print("--check: nothing was written")
            return
        beside: dict[Path, Iterable[bytes]] = {
            report_path: json_pieces([report.figures() for report in reports]),
            rejected_path: itertools.chain.from_iterable(report.rejected_lines() for report in reports),
        }
        if excess:
            write_files(beside)
            raise UserError(f"{excess} Only {rejected_path} and {report_path} were written")
        if disk is None:
            write_records(image_map, captions, image_map_path, captions_path, beside)
        else:
            disk.write(image_map_path, captions_path, beside)
    print(f"written: {', '.join(map(str, outputs.values()))}")


def output_files(data: Data) -> dict[str, Path]:
    """Return the four output files by their names in messages."""
    captions = resolve_path(data.captions)
    return {
        "'data.image_map'": resolve_path(data.image_map),
        "'data.captions'": captions,
        f"{REPORT_FILE} (beside 'data.captions')": captions.with_name(REPORT_FILE),
        f"{REJECTED_FILE} (beside 'data.captions')": captions.with_name(REJECTED_FILE),
    }


def refuse_writing_over_inputs(outputs: dict[str, Path], data: Data, config: Path) -> None:
    """Check that no output is another output, an input, a folder or an existing file without JSON.

    Raises:
        UserError: names both files.
    """
    for (name, file), (other_name, other) in itertools.combinations(outputs.items(), 2):
        if _same_file(file, other) or str(file).casefold() == str(other).casefold():
            raise UserError(f"{name} and {other_name} are both {file}: give them different names")
    inputs = {"the config": config}
    for index, source in enumerate(data.sources):
        inputs[f"'data.sources.{index}.annotations'"] = resolve_path(source.annotations)
        if source.questions is not None:
            inputs[f"'data.sources.{index}.questions'"] = resolve_path(source.questions)
    for name, file in outputs.items():
        for input_name, other in inputs.items():
            if _same_file(file, other):
                raise UserError(f"{name} would be written over {input_name}, {other}: choose another name for it")
        if os.path.isdir(file):
            raise UserError(f"{name}: {file} is a folder: name a file in it")
        if os.path.isfile(file) and not _holds_records(file):  # a photo, for example
            raise UserError(
                f"{name}: {file} exists and is not a file of records, so it is not written over: choose another"
            )


def _same_file(file: Path, other: Path) -> bool:
    try:
        return os.path.samefile(file, other)  # also through links and on case-insensitive file systems
    except (OSError, ValueError):  # one of them does not exist
        return os.path.realpath(file) == os.path.realpath(other)


def _holds_records(file: Path) -> bool:
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(100).lstrip()
    except OSError as error:
        raise file_error(error, file) from error
    return beginning[:1] in (b"", b"{", b"[") or beginning.startswith(b"SQLite format 3")


def process_sources(data: Data, disk: DiskRecords | None = None) -> tuple[ImageMap, Captions, list[Report]]:
    """Read all sources in the order of the config and merge them into one image map and one set of captions.

    Args:
        disk: takes photos, entries and rejected rows; the image map and the captions are then empty.

    Raises:
        UserError: no sources, or a file or folder of a source is missing or not of its format.
    """
    if not data.sources:
        raise UserError("'data.sources' is empty: name at least one source with name, format, annotations and images")
    memory = MemoryRecords()
    records = memory if disk is None else disk
    reports = []
    for index, source in enumerate(data.sources):
        annotations, questions, images = _places(source, f"data.sources.{index}", data.check_images != "none")
        reader = READERS[source.format]
        report = Report(source.name, shown_path(annotations), spill=None if disk is None else disk.spill())
        rows = reader.load(annotations, questions, images, report.encodings)
        reader.process(
            tqdm(rows, desc=f"{source.name}: rows", unit="row"),
            source.images,
            records.photos,
            into=records,
            seed=data.seed,
            source=source.name,
            report=report,
            check=photo_check(data.check_images, source.name),
        )
        reports.append(report)
    return memory.image_map, memory.captions, reports


def _places(source: Source, key: str, check_images: bool) -> tuple[Path, Path | None, Path]:
    """Return where annotations, questions and photos of a source are; only shards may be at an address."""
    if source.format == "webdataset" and address(source.annotations):
        return Path(source.annotations), None, Path(source.images)
    for name in ("annotations", "questions", "images"):
        if address(getattr(source, name) or ""):
            advice = "only shards are read from the web (format: webdataset), so download it"
            if source.format == "webdataset":
                advice = "name it as 'annotations' too, for texts and photos are in the same shards"
            raise UserError(f"'{key}.{name}': {getattr(source, name)} is an address: {advice}")
    kind: Kind = "folder" if source.format == "webdataset" else "file"  # texts lie in the shards
    annotations = existing_path(source.annotations, f"{key}.annotations", kind)
    questions = existing_path(source.questions, f"{key}.questions") if source.questions is not None else None
    if check_images:
        existing_path(source.images, f"{key}.images", "folder")
    return annotations, questions, resolve_path(source.images)


def too_many_rejected(reports: list[Report], most: float) -> str:
    """Return a sentence about the sources with a rejected share above `most`; "" if there is none."""
    sentences = []
    for report in reports:
        count = report.rows - report.kept
        if report.rows == 0 or count / report.rows <= most:
            continue
        reasons = sorted(((entry["count"], reason) for reason, entry in report.dropped.items()), reverse=True)
        named = ", ".join(f"{reason} ({number:,})" for number, reason in reasons[:3])
        share = f"{count:,} of {report.rows:,} rows ({count / report.rows:.2%})"
        sentences.append(f"source '{report.source}': {share} are rejected, mostly: {named}.")
    if not sentences:
        return ""
    largest = max((report.rows - report.kept) / report.rows for report in reports if report.rows)
    allowed = min(1.0, math.ceil(largest * 100) / 100)
    return (
        f"{' '.join(sentences)} That is more than data.max_rejected = {most:g}: mend the rows, or allow it with "
        f"data.max_rejected={allowed:g}."
    )


if __name__ == "__main__":
    gc.disable()  # millions of small objects without cycles: collection would take a third of the run time
    run_script(main)
