"""Profile of one of our training steps, beside the machine's own matrix peak.

    python -m benchmarks.train_profile --shape half-b-24 --questions 1 --output benchmarks/results/train_profile.json

Runs forward and backward passes of `benchmarks.train_step`'s `ours` under torch's profiler and adds up the time of each
operator by kind. The peak is that of the fastest large square matrix product in the same precision, measured before and
after; the share of it counts the arithmetic that a step needs (`training/costs.py`), without attention scores.

`teraflops_of_llava` is the arithmetic of transformers' LLaVA for the same questions. The ratio of both is what leaving
out work can gain; the rest of a difference in time is what LLaVA spends outside of matrix products.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.train_sides import SHAPES, TEXT_TOKENS, as_batch, build_dataset, build_model, write_backbones
from model.precision import DTYPES, pick_precision
from training.batches import supervised_tokens
from training.costs import Arithmetic

# kind → substrings of operator names; the first matching kind counts
KINDS = {
    "matrix products": ("mm", "linear", "mkldnn"),
    "attention": ("scaled_dot_product", "flash"),
    "convolution (patches)": ("convolution",),
    "copies and casts": ("copy_", "cat", "clone", "masked", "index", "scatter", "gather"),
    "optimizer": ("Optimizer", "adam"),
    "element by element": ("mul", "add", "silu", "gelu", "pow", "mean", "norm", "exp", "div", "sub", "neg", "sum"),
}
SIZES, PRODUCTS = (1024, 2048, 4096), 3


def peak(dtype: torch.dtype) -> float:
    """Measure the operations per second of the fastest square matrix product."""
    best = 0.0
    for size in SIZES:
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(backbones: Path, options: argparse.Namespace, questions: int) -> dict:
    """Measure seconds of a forward and backward pass, its share of the peak, and the share of each operator kind."""
    dtype = DTYPES[options.precision]
    model = build_model(backbones, options).train()
    dataset = build_dataset(model, options.photos, questions, max_questions=questions)
    batch = as_batch([dataset[index] for index in range(len(dataset))])

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss(batch, 1)
        loss.backward()
        return time.perf_counter() - began

    fastest = peak(dtype)
    step()
    seconds = min(step() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    fastest = max(fastest, peak(dtype))
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    total, longest_first = sum(times.values()), sorted(times, key=times.__getitem__, reverse=True)
    tokens, crops = batch.input_ids.numel(), options.photos
    arithmetic = Arithmetic(model)
    operations = arithmetic.operations(tokens, supervised_tokens(batch), crops, crops)
    # LLaVA's class reads every question with its own copy of the photo, and `lm_head` runs at every position
    copies = crops * questions
    every = copies * (model.processor.chat.plan.crop_tokens + TEXT_TOKENS)
    of_llava = arithmetic.operations(every, every, copies, copies)
    return {
        "questions_per_photo": questions,
        "seconds": round(seconds, 3),
        "teraflops_needed": round(operations / 1e12, 3),
        "teraflops_of_llava": round(of_llava / 1e12, 3),
        "share_of_matrix_peak": round(operations / seconds / fastest, 3),
        "peak_gigaflops_a_second": round(fastest / 1e9, 1),
        "share_of_time": {kind: round(times[kind] / total, 3) for kind in longest_first},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="half-b-24", help="default half-b-24")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 5], help="per photo (default 1 5)")
    parser.add_argument("--photos", type=int, default=2, help="of a micro-batch (default 2)")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="default auto")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.device = "cpu"
    options.precision = pick_precision(options.precision, torch.device("cpu"))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), options.shape)
        for questions in options.questions:
            results.append(profile(backbones, options, questions))
            print(json.dumps(results[-1], indent=2), flush=True)
    report = {
        "shape": options.shape,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "machine": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
