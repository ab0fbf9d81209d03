"""The ways to hold a checkpoint's weights for answering: seconds, tokens per second, memory, and what they change.

    python -m benchmarks.answer_weights --checkpoint DIR         # also: how many validation answers stay the same
    python -m benchmarks.answer_weights --shape half-b-24        # random weights of these widths

and `--output FILE.json` to keep the figures.

`apart`: LoRA beside float32 weights, as in training. `merged`: LoRA added to them, as answering scripts load a
checkpoint on a CPU. `fp16`: these weights of the language model in fp16 (`train.precision=fp16`). `bf16`: all weights
in bf16, LoRA apart; slow on a CPU without bf16, so only with `--sides bf16`. `nf4` and `int8`: `llm.quantization`, LoRA
apart. `torchao`: as `merged`, then int8 by torchao's own layers, which the project does not use (pip install
torchao==0.18.0). All are asked two questions about a new photo in each run, and take turns. Differences are those from
`apart`.
"""

import argparse
import importlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.answer import QUESTIONS, Times, inputs, ours, picture
from benchmarks.answer_batch import data_requests, together
from benchmarks.report import write_report
from benchmarks.train_sides import SHAPES, build_model, write_backbones
from model.checkpoint import load_checkpoint, save_checkpoint
from model.model import MMultiModal
from qwen.half import HalfLinear

LORA_STD = 0.02  # of random LoRA, so that it changes what the model says
PRECISION = "train.precision"
SIDES = {
    **{"apart": {PRECISION: "float32"}, "merged": {PRECISION: "float32"}},
    **{"fp16": {PRECISION: "fp16"}, "bf16": {PRECISION: "bf16"}, "torchao": {PRECISION: "float32"}},
    **{kind: {PRECISION: "float32", "llm.quantization": kind} for kind in ("nf4", "int8")},
}
POSITIONS = 16  # last ones of each prompt, whose logits are compared


def random_checkpoint(folder: Path, shape: str) -> tuple[Path, dict[str, Any]]:
    """Write backbones and a checkpoint of random weights; return its folder and the places of the backbones."""
    backbones = write_backbones(folder, shape)
    model = build_model(backbones, argparse.Namespace(precision="float32", device="cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.parts:
            for weight in part.parameters.values():
                weight.normal_(std=0.2 if part.lora is None else LORA_STD, generator=generator)
    save_checkpoint(model, folder / "checkpoint-1", {}, {}, {})
    return folder / "checkpoint-1", {"visual.path": str(backbones / "siglip"), "llm.path": str(backbones / "qwen")}


def load(side: str, folder: Path, overrides: dict[str, Any]) -> MMultiModal:
    model = load_checkpoint(folder, "cpu", None, overrides | SIDES[side], side != "apart")
    if side == "torchao":
        torchao = importlib.import_module("torchao.quantization")  # not among the project's requirements
        torchao.quantize_(model.LLM, torchao.Int8WeightOnlyConfig())
    return model


def weight_bytes(model: MMultiModal) -> int:
    halves = [layer for layer in model.modules() if isinstance(layer, HalfLinear)]
    packed = sum(2 * layer.in_features * layer.out_features for layer in halves)
    return packed + sum(_bytes(weight) for weight in model.parameters())


def _bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight; torchao's consists of several tensors and tells the size that it stands for."""
    if hasattr(weight, "__tensor_flatten__"):
        return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
    return weight.nbytes


def measure(models: dict[str, MMultiModal], tokens: int, runs: int) -> dict[str, list[list[Times]]]:
    """Let the sides take turns with the same new photo; return the times of both questions of each run."""
    found: dict[str, list[list[Times]]] = {side: [] for side in models}
    for run in range(runs + 1):
        for side, model in models.items():
            ends, model.processor.chat.stop_ids = model.processor.chat.stop_ids, set()
            found[side].append(ours(model, picture(run), tokens))
            model.processor.chat.stop_ids = ends
    return {side: times[1:] for side, times in found.items()}  # the first warms up


@torch.no_grad()
def logits(model: MMultiModal) -> torch.Tensor:
    """Return logits (questions, positions, V) of the benchmark's prompts."""
    given = [inputs(model, picture(0), question) for question in QUESTIONS]
    return torch.stack(
        [model(one["pixel_values"], one["input_ids"], logits_to_keep=POSITIONS).logits[0].float() for one in given]
    )


def figures(models: dict[str, MMultiModal], times: dict[str, list[list[Times]]]) -> dict[str, dict[str, Any]]:
    """Medians of each side, and of the ratios of its runs to those of `apart`."""
    expected = logits(models["apart"])
    report = {}
    for side, model in models.items():
        given = logits(model)
        rates = [statistics.mean(one.rate for one in run) for run in times[side]]
        apart = [statistics.mean(one.rate for one in run) for run in times["apart"]]
        report[side] = {
            "first_question_seconds": round(statistics.median(run[0].first_token for run in times[side]), 4),
            "second_question_seconds": round(statistics.median(run[1].first_token for run in times[side]), 4),
            "tokens_per_second": round(statistics.median(rates), 2),
            "decoding_times_faster": round(statistics.median(a / b for a, b in zip(rates, apart, strict=True)), 2),
            "weights_mib": round(weight_bytes(model) / 2**20),
            "largest_logit_difference": float(f"{(given - expected).abs().max():.2g}"),
            "equal_first_choices": round(float((given.argmax(-1) == expected.argmax(-1)).float().mean()), 3),
        }
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="widths of the model (default tiny)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="this one, and its validation questions")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["merged", "fp16"], help="besides apart")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default 32)")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        if options.checkpoint is None:
            folder, overrides = random_checkpoint(Path(name), options.shape)
        else:
            folder, overrides = options.checkpoint.absolute(), {}
        models = {side: load(side, folder, overrides) for side in dict.fromkeys(["apart", *options.sides])}
    report = {
        "model": options.shape if options.checkpoint is None else options.checkpoint.name,
        "tokens": options.tokens,
        "runs": options.runs,
        "sides": figures(models, measure(models, options.tokens, options.runs)),
        "logit_spread": float(f"{logits(models['apart']).std():.2g}"),
    }
    if options.checkpoint is not None:
        requests = data_requests(models["apart"], "val")
        texts = {side: together(model, requests, model.config.generate) for side, model in models.items()}
        report["questions"] = len(requests)
        report["equal_answers"] = {side: sum(map(str.__eq__, given, texts["apart"])) for side, given in texts.items()}
    report |= {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    write_report(report, options.output)


if __name__ == "__main__":
    main()
