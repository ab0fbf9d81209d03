"""Growth of the time and peak memory of a training step with text, supervised tokens, questions per photo and photos.

    python -m benchmarks.scaling [--shape tiny|half-b] [--output FILE.json]

Each row of numbers changes one quantity, all else fixed, and a straight line is fitted to it: `per_unit` is its slope.
`worst_fit` says by how much of its value a point is off the line at most: where that is large, growth is not linear. An
axis with a point that adds less than 16 MiB gets no line for memory: memory freed by earlier steps may hold it all.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy
import torch

from batch import Batch
from benchmarks.report import write_report
from benchmarks.train_sides import NEEDS_CUDA, SHAPES, as_batch, build_dataset, build_model, write_backbones
from benchmarks.train_step import peak_bytes, reset_peak
from model.model import DTYPES, pick_precision

# photos, questions per photo, tokens of a question with its answer, supervised tokens of these
START = {"photos": 1, "questions": 1, "text_tokens": 80, "answer_tokens": 40}
AXES: dict[str, tuple[dict[str, int], list[int]]] = {
    "text_tokens": ({}, [80, 400, 800, 1600]),
    "answer_tokens": ({"text_tokens": 1600}, [40, 256, 512, 1024]),  # the loss works in chunks of 256
    "questions": ({}, [1, 2, 4, 8]),
    "photos": ({}, [1, 2, 4, 8]),
}

LEAST_MIB = 16  # smaller growth cannot be distinguished from memory that the allocator keeps


def work(backbones: Path, options: argparse.Namespace, pipe) -> None:
    """Measure all points in a separate process; send seconds and peak bytes above the weights of each."""
    torch.set_num_threads(options.threads)
    model = build_model(backbones, options).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    dtype = DTYPES[options.precision]

    def step(batch: Batch) -> float:
        began = time.perf_counter()
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        return time.perf_counter() - began

    batches = {}
    for axis, (fixed, values) in AXES.items():
        for value in values:
            point = START | fixed | {axis: value}
            dataset = build_dataset(
                model, point["photos"], point["questions"], point["text_tokens"], point["answer_tokens"], 16
            )
            batches[axis, value] = as_batch([dataset[i] for i in range(len(dataset))]).to(options.device)
    step(batches["photos", 1])
    seconds: dict[tuple, list[float]] = {point: [] for point in batches}
    memory = {}
    for _ in range(options.rounds):  # all points in turn, so noise of the machine affects all
        for point, batch in batches.items():
            reset_peak(options.device)
            before = peak_bytes(options.device)
            seconds[point].append(step(batch))
            memory[point] = peak_bytes(options.device) - before
    pipe.send({point: (statistics.median(seconds[point]), memory[point]) for point in batches})


def fit_memory(values: list[int], mib: list[float]) -> dict[str, float] | None:
    """Fit as `fit`; None if a point is below `LEAST_MIB`."""
    return fit(values, mib) if min(mib) >= LEAST_MIB else None


def fit(values: list[int], measured: list[float]) -> dict[str, float]:
    """Fit a straight line; return its slope and the largest relative deviation of a point."""
    slope, start = numpy.polyfit(values, measured, 1)
    off = max(abs(start + slope * x - y) / y for x, y in zip(values, measured, strict=True))
    return {"per_unit": float(slope), "worst_fit": round(float(off), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="widths of the model (default tiny)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each point (default 3)")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="default auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default all)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape in NEEDS_CUDA and options.device != "cuda":
        raise SystemExit(f"error: shape {options.shape} needs a CUDA GPU; --shape half-b runs on a CPU")
    options.precision = pick_precision(options.precision, torch.device(options.device))
    # as in train_step.py, measure the memory of tensors without glibc's cache; times then include page faults
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipe, theirs = context.Pipe()
        process = context.Process(target=work, args=(write_backbones(Path(folder), options.shape), options, theirs))
        process.start()
        theirs.close()
        measured = pipe.recv()
        process.join()
    report = {"shape": options.shape, "precision": options.precision, "threads": options.threads, "axes": {}}
    for axis, (fixed, values) in AXES.items():
        seconds, memory = zip(*(measured[axis, value] for value in values), strict=True)
        mib = [peak / 2**20 for peak in memory]
        report["axes"][axis] = {
            "fixed": {name: value for name, value in (START | fixed).items() if name != axis},
            "values": values,
            "seconds": [round(value, 3) for value in seconds],
            "memory_mib": [round(value) for value in mib],
            "seconds_fit": fit(values, list(seconds)),
            "memory_mib_fit": fit_memory(values, mib),
        }
    write_report(report, options.output)


if __name__ == "__main__":
    main()
