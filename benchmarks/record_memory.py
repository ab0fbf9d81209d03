"""Memory and time of preparing, training and resuming with millions of rows, each on a photo of its own.

    python -m benchmarks.record_memory --rows 10000000 --output benchmarks/results/record_memory_sqlite.json
    python -m benchmarks.record_memory --rows 10000000 --skip-prepare      # records made by SQL, in a tenth of the time
    python -m benchmarks.record_memory --rows 200000 --form json

Writes drawn-up rows as jsonl, then runs in processes of their own: `process_image.py` (without a check of the photos),
`train.py` for three steps of the demo's backbones with two workers and a validation, and `train.py --resume` for one
more. All photos are one plain picture, made in memory. Memory is the largest sum over the process and its workers, in
MiB, of the proportional set size (of the resident size where the system knows no other), libraries and model included;
what the system caches of files is not in it. Linux only: loader workers must be forked, to have that picture.
"""

import argparse
import gc
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
import psutil
import yaml

from benchmarks.report import write_report
from paths import REPO_ROOT

MADE = """
CREATE TABLE {table};
WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT {rows})
INSERT INTO {name} SELECT {values} FROM numbers;
"""
MADE_TABLES = {
    "image_map": (
        "photos (ID INTEGER PRIMARY KEY, key TEXT NOT NULL, image_file TEXT NOT NULL, path TEXT NOT NULL, box TEXT)",
        """n, printf('photos/part-%05d/%09d.jpg', n / 10000, n), printf('part-%05d/%09d.jpg', n / 10000, n),
        printf('/data/photos/part-%05d/%09d.jpg', n / 10000, n), NULL""",
    ),
    "captions": (
        "entries (number INTEGER PRIMARY KEY, photo INTEGER, content TEXT NOT NULL)",
        """n + 1, n, json_object('source', 'rows',
        'q', printf('<|extra_0|>%sWhat is shown in picture %d, and where was it taken?', char(10), n),
        'a', json_array(printf('A street with %d people, seen from floor %d on a rainy day.', n % 97, n % 13)))""",
    ),
}
STAGES = ("prepare", "train", "resume")
INTERVAL = 0.5  # seconds between two readings of the memory


def write_rows(file: Path, rows: int) -> None:
    """Write jsonl rows of about 200 bytes."""
    with open(file, "wb") as lines:
        for number in range(rows):
            row = {
                "image": f"part-{number // 10_000:05}/{number:09}.jpg",
                "question": f"What is shown in picture {number}, and where was it taken?",
                "answer": f"A street with {number % 97} people, seen from floor {number % 13} on a rainy day.",
            }
            lines.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def make_records(folder: Path, rows: int) -> None:
    """Write the files that `process_image.py` would make of `write_rows`."""
    for file, (table, values) in MADE_TABLES.items():
        with sqlite3.connect(folder / f"{file}.sqlite") as database:
            database.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"
                + MADE.format(table=table, name=table.split()[0], rows=rows, values=values)
                + "COMMIT;"
            )
        database.close()


def write_config(folder: Path, form: str) -> Path:
    """Write the config of all stages: the demo's model on the rows in `folder`."""
    config = yaml.safe_load((REPO_ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    source = {"name": "rows", "format": "jsonl", "annotations": str(folder / "rows.jsonl"), "images": str(folder)}
    config["data"] = {
        "sources": [source],
        "image_map": str(folder / f"image_map.{form}"),
        "captions": str(folder / f"captions.{form}"),
        "check_images": "none",
        "val_fraction": 0.02,
    }
    config["train"] |= {
        "output_dir": str(folder / "run"),
        "micro_batch": 1,
        "accumulation": 1,
        "workers": 2,
        "eval_samples": 4,
        "eval_steps": 1000,
        "trackers": [],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def run_stage(stage: str, config: Path) -> None:
    """Run one stage in this process."""
    if stage == "prepare":
        import process_image

        gc.disable()  # as the script does
        process_image.main(["--config", str(config)])
        return
    from PIL import Image

    from config import load_config
    from training import feature_cache
    from training.stages import stages

    picture = Image.new("RGB", (96, 96), "grey")
    feature_cache.load_image = lambda file, max_pixels=0: picture
    steps = 3 if stage == "train" else 4
    began = time.perf_counter()
    for trainer in stages(load_config(config, [f"train.max_steps={steps}"]), None if stage == "train" else "auto"):
        print(f"{stage}: {time.perf_counter() - began:.1f} s until the run is built", flush=True)
        trainer.run()


def memory(process: psutil.Process) -> int:
    """Return the bytes of a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            full = one.memory_full_info()
            total += getattr(full, "pss", full.rss)
        except psutil.Error:  # it has ended
            continue
    return total


def measure(stage: str, config: Path) -> dict[str, float]:
    """Run a stage in a new process; return its seconds and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.record_memory", "--stage", stage, "--config", str(config)]
    began, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, cwd=REPO_ROOT)
    watched = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            peak = max(peak, memory(watched))
        except psutil.Error:
            break
        time.sleep(INTERVAL)
    if child.wait() != 0:
        raise SystemExit(f"{stage} failed")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_mib": round(peak / 2**20)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--form", choices=("sqlite", "json"), default="sqlite")
    parser.add_argument("--folder", type=Path, help="where to write rows and records; default: the temporary folder")
    parser.add_argument("--skip-prepare", action="store_true", help="make the records by SQL; only for sqlite")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.skip_prepare and args.form != "sqlite":
        parser.error("--skip-prepare makes sqlite only")
    if args.stage is not None:
        run_stage(args.stage, args.config)
        return
    folder = Path(tempfile.mkdtemp(prefix="record_memory-", dir=args.folder))
    try:
        if args.skip_prepare:
            make_records(folder, args.rows)
        else:
            write_rows(folder / "rows.jsonl", args.rows)
        config = write_config(folder, args.form)
        stages = STAGES[1:] if args.skip_prepare else STAGES
        report = {"rows": args.rows, "form": args.form} | {stage: measure(stage, config) for stage in stages}
        names = (f"image_map.{args.form}", f"captions.{args.form}")
        report["file_mib"] = {name: round((folder / name).stat().st_size / 2**20) for name in names}
        report["machine"] = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        report["machine"]["sqlite"] = sqlite3.sqlite_version
        write_report(report, args.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
