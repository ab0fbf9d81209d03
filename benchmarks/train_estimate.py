"""The estimate of `train.py --dry-run` beside what a step then really takes: peak memory and time.

    python -m benchmarks.train_estimate [--config configs/demo.yaml] [--micro-batch 8] [--output FILE] [key=value …]

The estimate is made from passes over at most 4 copies of the longest sample; the step has `--micro-batch` of them and
is made whole, with clipping and AdamW. With and without gradient checkpointing. The data of the config must be there
(`python -m demo.make_data`, `python process_image.py --config configs/demo.yaml`).
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from config import load_config, run_script, script_arguments
from training.costs import PeakMemory
from training.loop import Trainer


def measure(trainer: Trainer, micro_batch: int, checkpointing: bool) -> dict:
    """Estimated and measured figures of one optimiser step with one micro-batch, and their relative errors."""
    estimate = trainer.estimate
    tokens = micro_batch * estimate.longest
    estimated = {
        "peak_mib": estimate.memory(micro_batch, checkpointing) / 2**20,
        "seconds": estimate.seconds(tokens, checkpointing),
    }
    trainer.set_checkpointing(checkpointing)
    batch = estimate.copies(micro_batch)
    trainer._step([batch])  # the first one makes the optimiser's state
    seconds = []
    with PeakMemory(trainer.accelerator.device) as peak:
        for _ in range(4):
            began = time.perf_counter()
            trainer._step([batch])
            seconds.append(time.perf_counter() - began)
    measured = {"peak_mib": peak.bytes / 2**20, "seconds": min(seconds)}
    errors = {name: round(estimated[name] / measured[name] - 1, 3) for name in measured}
    return {
        "tokens": tokens,
        "estimated": {name: round(value, 2) for name, value in estimated.items()},
        "measured": {name: round(value, 2) for name, value in measured.items()},
        "relative_error": errors,
    }


def main() -> None:
    parser = script_arguments(__doc__, default_config="configs/demo.yaml")
    parser.add_argument("--micro-batch", type=int, default=8, help="of the measured step (default 8)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config(options.config, [*options.overrides, f"train.output_dir={folder}"]))
        device = trainer.accelerator.device
        result = {
            "config": options.config,
            "micro_batch": options.micro_batch,
            "precision": trainer.precision,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
        }
        for checkpointing in (True, False):
            name = f"gradient checkpointing {'on' if checkpointing else 'off'}"
            result[name] = measure(trainer, options.micro_batch, checkpointing)
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
