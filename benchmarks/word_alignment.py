"""Train twice, with a new projector and with one that was aligned with words first: validation losses and seconds.

    python -m benchmarks.word_alignment --config configs/flickr8k_light.yaml --steps 60 --processes 2 \\
        --plain train.parts.projector.lr=2.0e-3 --output benchmarks/results/word_alignment.json \\
        train.word_alignment=12 train.parts.projector.lr=3.0e-4 train.micro_batch=2 train.workers=0

Needs a config whose data set is prepared, and `train.word_alignment` above 0; `--plain` gives the side without
it the settings that suit it better. Both sides go through train.py, as a person would, and see the same samples in the
same order. Of each: the validation loss four times, the seconds of training with the alignment, and how much alike the
tokens of different photos are in the end (mean cosine over pairs of tokens of two photos each).
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from cli import run_script

import torch
from torch.nn import functional

from benchmarks.real_run import training_command
from benchmarks.report import write_report
from config import Config, load_config
from errors import UserError
from model.checkpoint import load_checkpoint
from paths import REPO_ROOT
from training.data import read_split
from visual.photo import load_image

EVALUATIONS = 4
PHOTOS = 40  # whose tokens are compared


def sameness(checkpoint: Path, config: Config) -> float:
    """Mean cosine between the image tokens of photos held out and those at the same place of the next photo."""
    model = load_checkpoint(checkpoint)
    photos, _, val = read_split(config)
    IDs = list(dict.fromkeys(entry.images[0] for entry in val if entry.images))[:PHOTOS]
    tokens = []
    with torch.no_grad():
        for ID in IDs:
            image = load_image(photos[ID].picture)
            whole = model.processor.pixels(image, model.processor.plan(*image.size))[:1].to(model.device)
            tokens.append(model.project(model.encode_image(whole))[0].float())  # (M, Dl)
    first, second = torch.stack(tokens[:-1]), torch.stack(tokens[1:])
    return functional.cosine_similarity(first, second, dim=-1).mean().item()


def train(config: Path, overrides: list[str], processes: int, folder: Path) -> dict[str, Any]:
    """Train one side in `folder`; return what the table has of it."""
    options = ["--config", str(config.absolute()), *overrides, f"train.output_dir={folder}"]
    began = time.monotonic()
    done = subprocess.run(training_command(options, processes), cwd=REPO_ROOT, check=False)
    if done.returncode:
        raise UserError(f"train.py ended with status {done.returncode}: its last sentence says why")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    [checkpoint] = folder.glob("checkpoint-*")
    return {
        "overrides": overrides,
        "seconds": round(time.monotonic() - began),
        "val_losses": {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line},
        "sameness": round(sameness(checkpoint, load_config(config, overrides)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=200, help="of each side (default 200)")
    parser.add_argument("--processes", type=int, default=1, help="that train together, as with torchrun (default 1)")
    parser.add_argument(
        "--plain", action="append", default=[], metavar="key=value", help="of the side without it alone"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of both sides")
    args = parser.parse_intermixed_args()
    every = max(1, args.steps // EVALUATIONS)
    lengths = [f"train.max_steps={args.steps}", f"train.eval_steps={every}", f"train.save_steps={args.steps}"]
    overrides = [*args.overrides, *lengths]
    passes = load_config(args.config, overrides).train.word_alignment
    if passes == 0:
        raise UserError(
            "'train.word_alignment' is 0, so both sides would be the same: give the passes of the other side"
        )
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "plain": train(
                args.config,
                [*overrides, "train.word_alignment=0", *args.plain],
                args.processes,
                Path(folder) / "plain",
            ),
            "aligned": train(args.config, overrides, args.processes, Path(folder) / "aligned"),
        }
    last = sides["plain"]["val_losses"][args.steps]
    sooner = next((step for step, loss in sides["aligned"]["val_losses"].items() if loss <= last), None)
    result = {
        "config": str(args.config),
        "processes": args.processes,
        "passes": passes,
        **sides,
        "loss_difference": round(last - sides["aligned"]["val_losses"][args.steps], 4),
        "steps_for_the_same_loss": sooner,
        "steps_ratio": None if sooner is None else args.steps / sooner,
    }
    write_report(result, args.output)


if __name__ == "__main__":
    run_script(main)
