"""Estimates of `train.py --dry-run` beside measured steps: peak memory and time.

    python -m benchmarks.train_estimate [--config configs/demo.yaml] [--micro-batch 8] [--output FILE] [key=value …]

The estimate is made from passes over at most 4 copies of the longest sample; the step has `--micro-batch` of them and
is made whole, with clipping and AdamW. With and without gradient checkpointing. The data of the config must be there
(`python -m demo.make_data`, `python process_image.py --config configs/demo.yaml`).
"""

import os
import platform
import tempfile
import time
from pathlib import Path

from cli import run_script, script_arguments

import torch

from benchmarks.report import write_report
from config import load_config
from paths import REPO_ROOT
from training.costs import PeakMemory
from training.loop import Trainer, optimizer_step
from training.signals import StopSignals


def measure(trainer: Trainer, micro_batch: int, checkpointing: bool) -> dict:
    """Estimated and measured figures of one optimizer step with one micro-batch, and their relative error."""
    vars(trainer).pop("estimate", None)  # clear the cached property to measure again
    estimate = trainer.estimate
    tokens = micro_batch * estimate.longest
    estimated = (estimate.memory(tokens, checkpointing) / 2**20, estimate.seconds(tokens, checkpointing))
    batch, stop = estimate.copies(micro_batch), StopSignals()
    indices = [list(range(micro_batch))]
    optimizer_step(trainer, [batch], indices, False, stop)  # warm-up: creates the optimizer state
    seconds = []
    with PeakMemory(trainer.accelerator.device) as peak:
        for _ in range(3):
            began = time.perf_counter()
            optimizer_step(trainer, [batch], indices, False, stop)
            seconds.append(time.perf_counter() - began)
    measured = (peak.bytes / 2**20, min(seconds))
    return {
        name: {"estimated": round(guess, 2), "measured": round(fact, 2), "relative_error": round(guess / fact - 1, 3)}
        for name, guess, fact in zip(("peak_mib", "seconds"), estimated, measured, strict=True)
    }


def main() -> None:
    parser = script_arguments(__doc__, default_config="configs/demo.yaml")
    parser.add_argument("--micro-batch", type=int, default=8, help="of the measured step (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="estimates and measurements, in turns (default 3)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config(options.config, [*options.overrides, f"train.output_dir={folder}"]))
        device = trainer.accelerator.device
        result = {
            "config": os.path.relpath(options.config, REPO_ROOT),
            "micro_batch": options.micro_batch,
            "precision": trainer.precision,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
        }
        for checkpointing in (True, False):
            name = f"gradient checkpointing {'on' if checkpointing else 'off'}"
            rounds = [measure(trainer, options.micro_batch, checkpointing) for _ in range(options.rounds)]
            # use the median round of each figure, because other programs disturb times
            result[name] = {
                figure: sorted((made[figure] for made in rounds), key=lambda made: made["relative_error"])[
                    len(rounds) // 2
                ]
                for figure in rounds[0]
            }
    write_report(result, options.output)


if __name__ == "__main__":
    run_script(main)
