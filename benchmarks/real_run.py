"""One try of the run on real photos: train for a limited time, score on held-out photos, and add a row to a table.

    python -m benchmarks.real_run NAME --config configs/flickr8k_light.yaml --minutes 120 \\
        --annotations data/flickr8k/val_en.json --images data/flickr8k/Flicker8k_Dataset [train.max_steps=1500 …]

Calls process_image.py, train.py and, with annotations, eval_vqa.py, as a person would. The run is in
`train.output_dir`; the same command goes on where an interrupted one stopped, and counts the time before. The row has
command, seconds, memory and scores; a row with the same name is replaced; `weights` tells which checkpoint it was. With
another name, other annotations or other `generate.` keys, the command scores a finished run once more.
docs/real_run.md shows the table.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cli import run_script

import torch

from config import load_config
from dataset.json_files import read_json
from errors import UserError
from model.checkpoint_folder import list_checkpoints, weights_digest
from model.precision import pick_device, pick_precision
from paths import REPO_ROOT
from training.provenance import code_commit

RESULTS = REPO_ROOT / "benchmarks" / "results" / "real_run.json"
STANDARD = {".json": "coco_captions", ".jsonl": "jsonl"}


def training_command(options: list[str], processes: int) -> list[str]:
    """Command that trains in one process, or in several by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *torchrun, "train.py", *options]


def train_for(config: list[str], folder: Path, minutes: float, clock: Path, processes: int = 1) -> dict[str, Any]:
    """Train until the end or the limit; return seconds of all calls, memory, steps and losses.

    Args:
        folder: the run's.
        clock: file with the seconds of earlier calls.
        processes: started by torchrun, if more than one.
    """
    ended = {0, 128 + signal.SIGTERM}
    begun = list_checkpoints(folder)
    seconds = float(clock.read_text()) if begun and clock.is_file() else 0.0
    if not begun or seconds < 60 * minutes:
        start, told = time.monotonic(), []
        # an exception of the handler could come while the process begins, which would then be left running
        before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        command = training_command([*config, *(["--resume", "auto"] if begun else [])], processes)
        try:
            with subprocess.Popen(command, cwd=REPO_ROOT) as process:
                while process.poll() is None and not told and time.monotonic() < start + 60 * minutes - seconds:
                    time.sleep(0.1)
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)  # the run stores a checkpoint and ends
                    if processes > 1:
                        ended.add(1)  # torchrun hands the signal on, but not the status
                status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if list_checkpoints(folder)[-1:] != begun[-1:]:  # a finished run is only started and ends
                seconds += time.monotonic() - start
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text(f"{seconds:.0f}")
        if told:
            sys.exit(128 + signal.SIGTERM)
        if status not in ended:
            raise UserError(f"train.py ended with status {status}: its last sentence says why")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    return {
        "seconds": round(seconds),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line), 2),
        "steps": lines[-1]["step"],
        "epochs": round(lines[-1]["epoch"], 2),
        "val_losses": [round(loss, 3) for loss in validated],
    }


def score(
    checkpoint: Path, output: Path, annotations: Path, images: Path, options: list[str], decoding: list[str]
) -> dict[str, Any]:
    """Score a checkpoint on held-out questions, beside all baselines; return a few of the scores.

    Args:
        output: folder of the report.
        annotations: a standard file, or AI Challenger's rows, which are prepared as a source first.
        options: the config and overrides of process_image.py.
    """
    command = [sys.executable, "eval_vqa.py", "--checkpoint", checkpoint]
    if annotations.suffix == ".json" and isinstance(read_json(annotations), list):
        place = {"annotations": str(annotations), "images": str(images)}
        sources = json.dumps([{"name": "held out", "format": "ai_challenger"} | place])
        files = [f"data.image_map={output / 'map.json'}", f"data.captions={output / 'captions.json'}"]
        prepare = [sys.executable, "process_image.py", *options, f"data.sources={sources}", *files]
        subprocess.run(prepare, cwd=REPO_ROOT, check=True)
        command += ["--split", "all", *files]
    else:
        command += ["--format", STANDARD[annotations.suffix], "--annotations", annotations, "--images", images]
    done = subprocess.run([*map(str, command), "--output", str(output), *decoding], cwd=REPO_ROOT, check=False)
    if done.returncode:
        raise UserError(f"eval_vqa.py ended with status {done.returncode}: its last sentence says why")
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return {
        "photos": metrics["photos"],
        "questions": metrics["questions"],
        "seconds": metrics["seconds"],
        "computed": metrics["settings"]["computed"],
        "visual_gain": metrics["visual_gain"],
        "passes": {
            name: scores["overall"]
            | {"accuracy_by_type": {kind: own["accuracy"] for kind, own in scores["by_type"].items()}}
            for name, scores in metrics["passes"].items()
        },
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the row")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=120, help="of training, interruptions left out (default 120)")
    parser.add_argument("--processes", type=int, default=1, help="that train together, as with torchrun (default 1)")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="held out: COCO captions, AI Challenger's rows or jsonl; without it, the row has validation losses only",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="photos of the annotations")
    parser.add_argument("--note", default="", help="a sentence for the table")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json", help="the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if (args.annotations is None) != (args.images is None):
        parser.error("--annotations and --images belong together")
    return args


def own_command(args: argparse.Namespace) -> str:
    """Return the command line that makes this row."""
    options = ["--config", args.config, "--minutes", f"{args.minutes:g}", "--processes", args.processes]
    if args.annotations is not None:
        options += ["--annotations", args.annotations, "--images", args.images]
    return shlex.join(["python", "-m", "benchmarks.real_run", args.name, *map(str, [*options, *args.overrides])])


def main() -> None:
    args = read_arguments()
    config = load_config(args.config, args.overrides)
    folder = REPO_ROOT / config.train.output_dir
    options = ["--config", str(args.config.absolute()), *args.overrides]
    if config.data.sources and not list_checkpoints(folder):  # not of a run that goes on: a resumed run keeps its data
        subprocess.run([sys.executable, "process_image.py", *options], cwd=REPO_ROOT, check=True)
    trained = train_for(options, folder, args.minutes, folder.with_name(f"{folder.name}.seconds"), args.processes)
    checkpoint = list_checkpoints(folder)[-1]
    decoding = [override for override in args.overrides if override.startswith("generate.")]  # a finished run too
    row = {
        "name": args.name,
        "note": args.note,
        "command": own_command(args),
        "commit": code_commit(),
        "device": torch.cuda.get_device_name()
        if pick_device().type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "processes": args.processes,
        "threads": torch.get_num_threads(),
        "precision": pick_precision(config.train.precision, pick_device()),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "training": trained,
        "checkpoint": {"folder": checkpoint.name, "weights": weights_digest(checkpoint)},
    }
    if args.annotations is not None:
        files = args.annotations.absolute(), args.images.absolute()
        row["scores"] = score(checkpoint, checkpoint / f"eval_{args.name}", *files, options, decoding)
    rows = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    rows = [*(other for other in rows if other["name"] != args.name), row]
    args.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
