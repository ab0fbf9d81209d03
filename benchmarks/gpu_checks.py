"""The checks of `benchmarks/gpu.py`: each returns figures for the report, and bars.

Weights are random at the true widths and depths, because their values change neither time nor memory. Without a GPU the
checks run at the demo's size.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from batch import Batch
from benchmarks.train_sides import as_batch, build_dataset, build_model, write_backbones
from compat import set_activation_checkpointing
from paths import REPO_ROOT
from qwen.attention import PackedMask, shared_prefix_attention
from training.batches import supervised_tokens

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DEMO_CONFIG = ["--config", "configs/demo.yaml"]


class Bar(NamedTuple):
    """A figure and the limit that it has to keep.

    Attributes:
        value: None: not measured here.
        correctness: it counts without a GPU too.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    correctness: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


Checked = tuple[dict[str, Any], list[Bar]]  # figures for the report, bars


def shape(full: str) -> str:
    """Return the shape to measure: `full` on a GPU, the demo's models without."""
    return full if GPU else "tiny"


def command(*words: object, environment: dict[str, str] | None = None) -> None:
    """Run a command of the project; its output goes to the error stream."""
    subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPO_ROOT,
        check=True,
        stdout=sys.stderr,
        env=os.environ | (environment or {}),
    )


def report_of(module: str, *words: object) -> Any:
    """Run another benchmark and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command("-m", f"benchmarks.{module}", *words, "--output", file)
        return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def demo_data() -> list[str]:
    """Draw a few photos of the demo's world; return overrides that name them."""
    folder = Path(tempfile.mkdtemp())
    sources = [
        {"name": "captions", "format": "ai_challenger", "annotations": "ai_challenger/annotations.json"},
        {"name": "questions", "format": "llava", "annotations": "llava/annotations.json"},
    ]
    for source in sources:
        source["images"] = str(folder / Path(source["annotations"]).parent / "photos")
        source["annotations"] = str(folder / source["annotations"])
    overrides = [
        f"data.sources={json.dumps(sources)}",
        f"data.image_map={folder / 'map.json'}",
        f"data.captions={folder / 'captions.json'}",
        "data.cache_features=false",
    ]
    command("-m", "demo.make_data", "--photos", 100, "--output", folder)
    command("process_image.py", *DEMO_CONFIG, *overrides)
    return overrides


def training_lines(
    folder: Path, *overrides: str, launcher: tuple = (), environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Train on the demo's photos; return the lines of its log that have a loss."""
    size = ["train.micro_batch=2", "train.accumulation=2"]
    settings = [*size, "train.log_steps=1", "train.eval_steps=1000", f"train.output_dir={folder}"]
    command(*launcher, "train.py", *DEMO_CONFIG, *demo_data(), *settings, *overrides, environment=environment)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


# a tenth of the demo's rates: its own make the losses of ten steps differ by more than rounding does
SMALL_STEPS = ("train.parts.projector.lr=6.0e-4", "train.parts.llm.lr=7.0e-5")


def precisions() -> Checked:
    """Train ten steps of the demo in every precision; the CPU's float32 is the oracle.

    The limits are those of rounding: 24, 11 and 8 bits, through four layers and ten steps. They hold for the losses of
    all steps in norm, because each step carries the differences of those before on.
    """
    limits = {"float32": 1e-3, "fp16": 1e-2, "bf16": 2e-2} if GPU else {"float32": 0.0, "bf16": 2e-2}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("oracle", *limits):
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if precision == "oracle" else {}
            wanted = "float32" if precision == "oracle" else precision
            lines = training_lines(
                Path(folder) / precision, "train.max_steps=10", f"train.precision={wanted}", *SMALL_STEPS,
                environment=hidden,
            )  # fmt: skip
            losses[precision] = [line["loss"] for line in lines]
    true = torch.tensor(losses["oracle"])
    apart = {name: float((torch.tensor(losses[name]) - true).norm() / true.norm()) for name in limits}
    bars = [Bar(f"difference in norm, {name}", apart[name], at_most=limits[name], correctness=True) for name in limits]
    return {"losses": losses}, bars


def attention() -> Checked:
    """Compare the attention over a packed row with FlexAttention and the same rule, forward and backward."""
    heads, groups, width, lengths = (12, 2, 128, ((740, 80, 80, 80, 80, 80),) * 2) if GPU else (2, 1, 16, ((9, 4, 4),))
    tokens = sum(map(sum, lengths))
    sample, branch = [], []
    for number, own in enumerate(lengths):
        for part, length in enumerate(own):
            sample += [number] * length
            branch += [part] * length
    sample_of, branch_of = torch.tensor(sample, device=DEVICE), torch.tensor(branch, device=DEVICE)

    def visible(_, __, query, key):
        own = (branch_of[key] == 0) | (branch_of[key] == branch_of[query])
        return (query >= key) & (sample_of[query] == sample_of[key]) & own

    block_mask = create_block_mask(visible, None, None, tokens, tokens, device=DEVICE)
    flex = torch.compile(flex_attention) if GPU else flex_attention
    mask = PackedMask(lengths, None)  # of a step: its layers share it, as they share FlexAttention's
    sides: dict[str, Callable] = {
        "ours": lambda q, k, v: shared_prefix_attention(torch.nn.Module(), q, k, v, mask)[0],
        "flex": lambda q, k, v: flex(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2),
    }
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32
    rows = [torch.randn(1, count, tokens, width, generator=generator) for count in (heads, groups, groups)]
    given = [row.to(DEVICE, dtype).requires_grad_(GPU) for row in rows]  # on a CPU, FlexAttention has no backward pass
    found, seconds = {}, {}
    for name, side in sides.items():
        for _ in range(3):  # compiles and warms up
            out = side(*given)
            found[name] = [out, *(torch.autograd.grad(out.float().square().sum(), given) if GPU else ())]
        seconds[name] = seconds_of(lambda side=side: side(*given).float().sum().backward() if GPU else side(*given))
    apart = max(
        float((own.double() - other.double()).detach().norm() / other.double().detach().norm())
        for own, other in zip(found["ours"], found["flex"], strict=True)
    )
    bars = [
        Bar("largest relative difference", apart, at_most=2e-2 if GPU else 1e-5, correctness=True),
        Bar("times faster than flex", round(seconds["flex"] / seconds["ours"], 2), at_least=0.5),
    ]
    return {"tokens": tokens, "milliseconds": {name: round(1e3 * own, 3) for name, own in seconds.items()}}, bars


def seconds_of(function: Callable[[], Any], times: int = 20) -> float:
    """Return the mean seconds of a call, with the work of the GPU."""
    began = time.perf_counter()
    for _ in range(times):
        function()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def step() -> Checked:
    """Time a training step at SigLIP so400m and Qwen2.5-1.5B beside LLaVA's class, with and without Liger."""
    sides = ["ours", "llava", "liger"]
    report = report_of(
        "train_step", "--shape", shape("so400m-1.5b"), "--questions", 1, 5, "--pairs", 5, "--sides", *sides
    )
    bars = []
    for result, fastest in zip(report["results"], (1.2, 3.0), strict=True):
        questions = result["questions_per_photo"]
        for side, ratio in result["times_faster_than"].items():
            bars.append(Bar(f"{questions} questions, times faster than {side}", ratio, at_least=fastest))
        share = result["share_of_memory_of"]["llava"]
        bars.append(Bar(f"{questions} questions, share of llava's memory", share, at_most=0.75))
    return report, bars


def compiled() -> Checked:
    """Time the step with torch.compile beside the step without."""
    options = ["--shape", shape("so400m-1.5b"), "--questions", 5, "--pairs", 5, "--sides", "ours"]
    plain, faster = report_of("train_step", *options), report_of("train_step", *options, "--compile")
    ratio = plain["results"][0]["seconds"]["ours"] / faster["results"][0]["seconds"]["ours"]
    return {"plain": plain, "compiled": faster}, [Bar("times faster when compiled", round(ratio, 2), at_least=0.9)]


def seven_b() -> Checked:
    """Train a step of SigLIP so400m and Qwen2.5-7B in 16, 8 and 4 bits, and read the peak memory.

    20 GB and 10 GB are what cards of 24 GB and 12 GB leave beside the screen and other programs. Without a GPU the same
    steps run where bitsandbytes is installed, and no peak is measured.
    """
    figures: dict[str, Any] = {}
    limits = {"none": 20.0, "int8": 14.0, "nf4": 10.0}
    if not GPU and importlib.util.find_spec("bitsandbytes") is None:
        limits = {"none": limits["none"]}
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), shape("qwen-7b"))
        for quantization in limits:
            figures[quantization] = _trained_step(backbones, quantization)
    bars = []
    for name, found in figures.items():
        before, after = found["losses"]
        bars.append(Bar(f"loss after a step, quantization {name}", after / before, at_most=0.9999, correctness=True))
        bars.append(Bar(f"peak gigabytes, quantization {name}", found["peak_gigabytes"], at_most=limits[name]))
    return figures, bars


def _trained_step(backbones: Path, quantization: str) -> dict[str, Any]:
    """Train two steps on two photos with two questions each; return losses, seconds of the second and peak memory."""
    options = argparse.Namespace(device=DEVICE, precision="bf16" if GPU else "float32")
    model = build_model(backbones, options, quantization=quantization).train()
    dataset = build_dataset(model, 2, 2, max_questions=2)
    set_activation_checkpointing(model.language_model, True)
    batch = as_batch([dataset[index] for index in range(len(dataset))]).to(torch.device(DEVICE))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    count, losses, seconds = supervised_tokens(batch), [], 0.0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            loss = model.loss(batch, count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.perf_counter() - began
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if GPU else None
    return {"losses": losses, "seconds": round(seconds, 3), "peak_gigabytes": peak}


def estimate() -> Checked:
    """Compare the dry run's estimate of memory with a real step, at so400m and 1.5B."""
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), shape("so400m-1.5b"))
        paths = [f"visual.path={backbones / 'siglip'}", f"llm.path={backbones / 'qwen'}"]
        report = report_of("train_estimate", *DEMO_CONFIG, "--rounds", 1, *demo_data(), *paths)
    bars = []
    for checkpointing in ("on", "off"):
        error = report[f"gradient checkpointing {checkpointing}"]["peak_mib"]["relative_error"]
        bars.append(Bar(f"error of memory, checkpointing {checkpointing}", error, at_least=-0.15, at_most=0.15))
    return report, bars


def utilisation() -> Checked:
    """Train as a user does, at so400m and 1.5B, and read the log: share of the matrix peak, waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder) / "backbones", shape("so400m-1.5b"))
        paths = [f"visual.path={backbones / 'siglip'}", f"llm.path={backbones / 'qwen'}"]
        micro_batch, steps = (16, 20) if GPU else (2, 12)
        sizes = [f"train.max_steps={steps}", f"train.micro_batch={micro_batch}", "train.accumulation=1"]
        lines = training_lines(Path(folder) / "run", *paths, *sizes, "train.workers=4")[10:]
    seconds, waiting = (sum(line[name] for line in lines) for name in ("seconds", "data_wait"))
    bars = [Bar("share of time that waits for data", round(waiting / seconds, 3), at_most=0.05)]
    if GPU:
        mfu = sorted(line["mfu"] for line in lines)[len(lines) // 2]
        bars.append(Bar("share of the matrix peak", round(mfu, 3), at_least=0.3))
    return {"log": lines[-1]}, bars


def answers() -> Checked:
    """Time first and second questions and decoding beside transformers, at so400m and 1.5B."""
    report = report_of("answer", "--shape", shape("so400m-1.5b"), "--runs", 3, "--tokens", 64)
    sooner, decoding = report["first_token_of_first_question_times_sooner"], report["decoding_times_faster"]
    bars = [
        Bar("first question, times sooner than transformers", sooner, at_least=0.95),
        Bar("second question, times sooner", report["first_token_of_second_question_times_sooner"], at_least=1.5),
        Bar("decoding, times faster than transformers", decoding, at_least=3.0 if GPU else 0.95),
    ]
    return report, bars


def pinned() -> Checked:
    """Time the copy of 16 photos to the GPU from page-locked memory, as in training, and from ordinary."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    pageable = Batch(ids, ids, ids, ((8,),), torch.randn(16, 3, 384, 384))
    sides = {"pageable": pageable, "pinned": pageable.pin_memory()}
    device, milliseconds = torch.device(DEVICE), {}
    for name, batch in sides.items():
        batch.to(device)  # the first copy asks the GPU for memory
        milliseconds[name] = round(1e3 * seconds_of(lambda batch=batch: batch.to(device)), 3)
    ratio = milliseconds["pageable"] / milliseconds["pinned"]
    return {"milliseconds": milliseconds}, [Bar("times faster than pageable", round(ratio, 2), at_least=1.0)]


def processes() -> Checked:
    """Train the demo with two processes, over NCCL on two GPUs, whole and sharded, and compare with one."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    settings = ["train.max_steps=5", "train.precision=float32"]
    sharded = ["train.accumulation=1", "train.shard=true", "train.gradient_checkpointing=off"]
    with tempfile.TemporaryDirectory() as folder:
        alone = training_lines(Path(folder) / "one", *settings)
        several = {
            "two processes": training_lines(Path(folder) / "two", *settings, "train.accumulation=1", launcher=two),
            "train.shard": training_lines(Path(folder) / "sharded", *settings, *sharded, launcher=two),
        }
    bars = []
    for name, lines in several.items():
        apart = max(abs(own["loss"] / other["loss"] - 1) for own, other in zip(alone, lines, strict=True))
        bars.append(Bar(f"largest difference of a loss, {name}", apart, at_most=1e-3, correctness=True))
    return {}, bars


CHECKS: dict[str, Callable[[], Checked]] = {
    "precisions": precisions,
    "attention": attention,
    "step": step,
    "compiled": compiled,
    "seven_b": seven_b,
    "pinned": pinned,
    "estimate": estimate,
    "utilisation": utilisation,
    "answers": answers,
    "processes": processes,
}
