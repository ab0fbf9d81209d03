"""Memory and time of preparing, training and resuming with millions of rows, each on a photo of its own.

    python -m benchmarks.record_memory --rows 10000000 --output benchmarks/results/record_memory_sqlite.json
    python -m benchmarks.record_memory --rows 200000 --form json

Writes drawn-up rows as jsonl, then runs in processes of their own: `process_image.py` (without a check of the photos),
`train.py` for three steps of the demo's backbones with two workers and a validation, and `train.py --resume` for one
more. All photos are one plain picture, made in memory. Memory is the largest sum over the process and its workers, in
MiB, of the proportional set size (of the resident size where the system knows no other), libraries and model included;
what the system caches of files is not in it. Linux and macOS.
"""

import argparse
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

STAGES = ("prepare", "train", "resume")
INTERVAL = 0.25  # seconds between two readings of the memory


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

        process_image.gc.disable()  # as the script does
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
        print(f"{stage}: {time.perf_counter() - began:.1f} s to the first step", flush=True)
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
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.stage is not None:
        run_stage(args.stage, args.config)
        return
    folder = Path(tempfile.mkdtemp(prefix="record_memory-", dir=args.folder))
    try:
        write_rows(folder / "rows.jsonl", args.rows)
        config = write_config(folder, args.form)
        report = {"rows": args.rows, "form": args.form} | {stage: measure(stage, config) for stage in STAGES}
        names = ("rows.jsonl", f"image_map.{args.form}", f"captions.{args.form}")
        report["file_mib"] = {name: round((folder / name).stat().st_size / 2**20) for name in names}
        report["machine"] = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        report["machine"]["sqlite"] = sqlite3.sqlite_version
        write_report(report, args.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
