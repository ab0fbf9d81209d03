"""One optimizer step of ours beside other ways to train: time, memory, ratios.

    python -m benchmarks.train_step --shape tiny|half-b|half-b-24|so400m-1.5b|qwen-7b --questions 1 2 5

and `--output FILE.json` to keep the figures.

Sides, all with the same weights, photos, questions, LoRA, precision, checkpointing and AdamW:

* `ours`: the questions of a photo in one sequence, `lm_head` on supervised positions.
* `unpacked`: ours with every question as a sample of its own.
* `llava`: transformers' `LlavaForConditionalGeneration` with peft, in a plain loop in place of `transformers.Trainer`,
  which adds its own work to a step but cannot be stopped after each to let the others have their turn.
* `liger`: the same with Liger's fused linear cross-entropy, where it can be imported (it needs Triton, so a GPU).
* `peft_lora`, `whole_last_layer`, `whole_layers`: ours with peft's own LoRA layers, with a last layer that computes all
  positions, and with transformers' own layers in place of `qwen/lean.py` (so all positions too): what these parts of
  our code are worth. Not among the default sides.
* `naive`: the loop of the report's ancestor: every question with its own copy of the photo, logits of all positions in
  float32.

Each side runs in a process of its own, and they take turns step by step, so that a noisy machine hits all. Their first
losses must agree before any time counts. Sides other than `ours` read their questions in micro-batches of `--photos`:
all logits of all questions would not fit into most memories.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.train_sides import (
    ANSWER_TOKENS,
    DEFAULT_SIDES,
    NEEDS_CUDA,
    SHAPES,
    SIDES,
    TEXT_TOKENS,
    write_backbones,
)
from model.model import DTYPES, pick_precision
from training.costs import peak_memory


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process since `reset_peak`: of the GPU, else resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert peak is not None, "/proc/self/status tells no VmHWM"
        return int(peak[1]) * 1024
    return peak_memory(torch.device(device))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":  # on other systems, the peak includes loading
        Path("/proc/self/clear_refs").write_text("5")


def work(side: str, backbones: Path, options: argparse.Namespace, questions: int, pipe) -> None:
    """Run a side in a separate process: one optimizer step per request; send the peak memory at the end."""
    torch.set_num_threads(options.threads)
    before = 0 if options.device == "cuda" else peak_bytes("cpu")  # Python and its libraries
    model, losses = SIDES[side](backbones, options, questions)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    dtype = DTYPES[options.precision]
    reset_peak(options.device)
    pipe.send("ready")
    while pipe.recv() == "step":
        began = time.perf_counter()
        total = 0.0
        for loss_of in losses:
            with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
                loss = loss_of()
            loss.backward()
            total += loss.item()  # waits for the GPU
            del loss
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        pipe.send((total, time.perf_counter() - began))
    pipe.send(peak_bytes(options.device) - before)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, *given) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, *given, theirs))
        self.process.start()
        theirs.close()  # else the pipe stays open when the process dies
        self.receive()  # load one side after another, to limit memory

    def ask(self, request: str):
        self.pipe.send(request)
        return self.receive()

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(
                f"error: side '{self.name}' ended with exit code {self.process.exitcode} (-9: the system ran out of "
                "memory): compare fewer sides at once, or a smaller shape"
            ) from None

    def stop(self) -> int:
        """End the process; return its peak memory."""
        peak = self.ask("stop")
        self.process.join()
        return peak


def measure_memory(side: str, backbones: Path, options: argparse.Namespace, questions: int) -> int:
    """Measure the peak bytes of two steps of a side, in a process that returns freed memory at once.

    By default, glibc keeps freed blocks of up to 32 MiB. On a CPU they are up to a third of the peak, and the amount
    varies. Returning memory takes time, so another process measures the time of the steps.
    """
    glibc = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    os.environ.update(glibc)
    running = Side(side, backbones, options, questions)
    for name in glibc:
        del os.environ[name]
    for _ in range(2):  # the second step starts with the optimizer state
        running.ask("step")
    return running.stop()


def measure(backbones: Path, options: argparse.Namespace, questions: int) -> dict:
    """Measure losses, seconds per step and peak memory of all sides, and the ratios to ours."""
    sides = [Side(name, backbones, options, questions) for name in options.sides]
    seconds: dict[str, list[float]] = {side: [] for side in options.sides}
    first_loss = {}
    for turn in range(options.pairs + 1):
        for side in sides:
            loss, elapsed = side.ask("step")
            print(f"{questions} questions, step {turn}, {side.name}: {elapsed:.1f} s", file=sys.stderr, flush=True)
            if turn == 0:  # warm-up
                first_loss[side.name] = loss
            else:
                seconds[side.name].append(elapsed)
        if turn == 0:
            tolerance = 1e-4 if options.precision == "float32" else 2e-2
            if max(first_loss.values()) - min(first_loss.values()) > tolerance * abs(first_loss["ours"]):
                raise SystemExit(f"error: the sides do not compute the same loss: {first_loss}")
    for side in sides:
        side.stop()
    memory = {side: measure_memory(side, backbones, options, questions) for side in options.sides}
    others = [side for side in options.sides if side != "ours"]
    return {
        "questions_per_photo": questions,
        "first_loss": first_loss,
        "seconds": {side: round(statistics.median(values), 4) for side, values in seconds.items()},
        "memory_mib": {side: round(value / 2**20) for side, value in memory.items()},
        "times_faster_than": {
            side: round(statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side], strict=True)), 2)
            for side in others
        },
        "share_of_memory_of": {side: round(memory["ours"] / memory[side], 2) for side in others},
    }


def why_no_liger(device: str) -> str | None:
    """Return the reason why the side `liger` cannot run here, or None."""
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None if device == "cuda" else "Triton kernels need a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="widths of the model (default tiny)")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 5], help="per photo (default 1 2 5)")
    parser.add_argument("--photos", type=int, default=2, help="of a micro-batch (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side that count (default 5)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=DEFAULT_SIDES)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="default auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile for our layers")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on all sides")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA's inputs, on all sides (default 0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default all)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape in NEEDS_CUDA and options.device != "cuda":
        raise SystemExit(f"error: shape {options.shape} needs a CUDA GPU; --shape half-b runs on a CPU")
    options.precision = pick_precision(options.precision, torch.device(options.device))
    options.sides = ["ours", *(side for side in options.sides if side != "ours")]
    skipped = {}
    reason = why_no_liger(options.device)
    if "liger" in options.sides and reason is not None:
        options.sides.remove("liger")
        skipped["liger"] = reason
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), options.shape)
        results = []
        for questions in options.questions:
            results.append(measure(backbones, options, questions))
            print(json.dumps(results[-1], indent=2), flush=True)
    report = {
        "shape": options.shape,
        "precision": options.precision,
        "photos": options.photos,
        "text_tokens_per_question": TEXT_TOKENS,
        "supervised_tokens_per_question": ANSWER_TOKENS,
        "checkpointing": options.checkpointing,
        "lora_dropout": options.dropout,
        "compiled": options.compile,
        "threads": options.threads,
        "machine": torch.cuda.get_device_name()
        if options.device == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "skipped": skipped,
        "results": results,
    }
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
