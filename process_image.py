"""Turns the raw annotations that the config names into `image_map.json` and `captions.json`.

    python process_image.py                                       # the sources of config.yaml
    python process_image.py --config configs/demo.yaml --check    # only tell what would be kept and dropped
    python process_image.py data.check_images=open                # decode every photo too

Prints what was kept, what was dropped and why, and writes the same to `process_report.json` beside the captions.
"""

import dataclasses
import gc
import os
from multiprocessing.pool import ThreadPool

from cli import run_script, script_arguments

from tqdm import tqdm

from config import Data, load_data
from dataset.json_files import read_json
from dataset.raw import READERS, Check, Report, merge_captions, process_ali, process_coco
from dataset.records import Captions, ImageMap, write_json_files, write_records
from errors import UserError
from paths import existing_path, resolve_path

__all__ = ["main", "process_ali", "process_coco", "process_sources", "read_json"]

REPORT_FILE = "process_report.json"
COLUMNS = {
    "rows": "rows read",
    "kept": "rows kept",
    "photos": "new photos",
    "questions": "questions",
    "tags_added": "tags added",
}


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="tell what would be kept and dropped, write nothing")
    args = parser.parse_intermixed_args(arguments)
    data = load_data(args.config, args.overrides)

    image_map, captions, reports = process_sources(data)
    print(report_text(reports))
    empty = [report.source for report in reports if report.kept == 0]
    if empty:
        raise UserError(f"no row is left of {', '.join(empty)}, see the reasons above; nothing was written")
    if args.check:
        print("--check: nothing was written")
        return
    image_map_path, captions_path = resolve_path(data.image_map), resolve_path(data.captions)
    write_records(image_map, captions, image_map_path, captions_path)
    report_path = captions_path.with_name(REPORT_FILE)
    write_json_files({report_path: [dataclasses.asdict(report) for report in reports]})
    print(f"written: {image_map_path}, {captions_path}, {report_path}")


def process_sources(data: Data) -> tuple[ImageMap, Captions, list[Report]]:
    """Read all sources in the order of the config, merged into one image map and one set of captions.

    Raises:
        UserError: no sources, or a file or folder of a source is missing or not of its format.
    """
    if not data.sources:
        raise UserError("'data.sources' is empty: name at least one source with name, format, annotations and images")
    image_map: ImageMap = {}
    captions: Captions = {}
    reports = []
    for index, source in enumerate(data.sources):
        key = f"data.sources.{index}"
        annotations = existing_path(source.annotations, f"{key}.annotations")
        questions = existing_path(source.questions, f"{key}.questions") if source.questions is not None else None
        images = resolve_path(source.images)
        if data.check_images != "none":
            existing_path(source.images, f"{key}.images", "folder")
        reader = READERS[source.format]
        report = Report(source.name)
        new_photos, new_captions = reader.process(
            tqdm(reader.load(annotations, questions, images), desc=f"{source.name}: rows", unit="row"),
            source.images,
            len(image_map),
            image_map=image_map,
            seed=data.seed,
            source=source.name,
            report=report,
            check=photo_check(data.check_images, source.name),
        )
        image_map |= new_photos
        merge_captions(captions, new_captions)
        reports.append(report)
    return image_map, captions, reports


def photo_check(mode: str, source: str) -> Check | None:
    """The check that `data.check_images` asks for: none, exists or open (decode, in threads: Pillow frees the GIL)."""
    if mode == "none":
        return None
    if mode == "open":
        from visual.transform import load_image  # here, since torch and transformers take five seconds to import

    def problem(path: str) -> tuple[str, str] | None:
        file = resolve_path(path)
        if not os.path.isfile(file):  # unlike Path.is_file it takes names that are too long
            return "photo not found", path
        if file.stat().st_size == 0:
            return "photo file is empty", path
        if mode == "open":
            try:
                load_image(file)
            except UserError as error:
                return "photo cannot be decoded", str(error)
        return None

    def check(paths: list[str]) -> dict[str, tuple[str, str]]:
        with ThreadPool() as pool:
            found = tqdm(pool.imap(problem, paths, chunksize=16), f"{source}: photos", len(paths), unit="photo")
            return {path: reason for path, reason in zip(paths, found, strict=True) if reason is not None}

    return check


def report_text(reports: list[Report]) -> str:
    """A table with one line per source and the total, then the dropped rows by reason with examples."""
    counts = [[report.source, *(getattr(report, name) for name in COLUMNS)] for report in reports]
    total = ["total", *(sum(column) for column in list(zip(*counts, strict=True))[1:])]
    width = max(len(row[0]) for row in [*counts, ["source"], total])
    lines = [f"{'source':{width}}" + "".join(f"  {title:>10}" for title in COLUMNS.values())]
    lines += [f"{row[0]:{width}}" + "".join(f"  {number:>10,}" for number in row[1:]) for row in [*counts, total]]
    for report in reports:
        for reason, entry in report.dropped.items():
            lines.append(f"{report.source}: dropped {entry['count']:,} rows, {reason}; for example")
            lines += [f"    {example}" for example in entry["examples"]]
    return "\n".join(lines)


if __name__ == "__main__":
    gc.disable()  # millions of small objects without cycles: looking through them would take a third of the time
    run_script(main)
