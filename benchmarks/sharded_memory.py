"""Peak memory of a training process with `train.shard`, for several numbers of processes, beside what the docs expect.

    python -m benchmarks.sharded_memory [--shape half-b-24] [--processes 1 2 4] [--output FILE.json]

A run of one process has all weights, as with `train.shard=false`. `formula_mib` is the formula of `docs/scaling.md`
without activations: these and what libraries allocate in the first steps are left of `peak_mib`, about the same for any
number of processes. Without a GPU, memory is resident memory above Python and its libraries.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from benchmarks.report import write_report
from benchmarks.train_sides import NEEDS_CUDA, SHAPES, as_batch, build_dataset, build_model, write_backbones
from benchmarks.train_step import peak_bytes, reset_peak
from compat import set_activation_checkpointing
from model.model import MMultiModal
from paths import REPO_ROOT
from training.estimate import ADAMW_BYTES
from training.sharding import wrap

GRADIENT_BYTES = 4  # of a trained weight: float32
STEPS = 2  # AdamW's state is there from the first on


def formula(model: MMultiModal, processes: int) -> int:
    """Return the bytes that `docs/scaling.md` expects of a process, without activations."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    shared = bytes_of(model) + (ADAMW_BYTES + GRADIENT_BYTES) * trained
    if processes == 1:
        return shared
    language_model = model.language_model
    head = language_model.get_output_embeddings()
    tied = head.weight is language_model.get_input_embeddings().weight
    whole = [language_model.get_input_embeddings(), model.encoder, *([] if tied else [head])]
    gathered, two_layers = (sum(map(bytes_of, modules)) for modules in (whole, language_model.model.layers[:2]))
    return shared // processes + gathered + max(gathered, two_layers)


def bytes_of(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def measure(backbones: Path) -> dict[str, Any]:
    """Train two steps in this process, one of those that torchrun started; return the largest figures of all."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    processes = accelerator.num_processes
    gather_object([0])  # the connections between the processes are no part of the model
    before = 0 if device == "cuda" else peak_bytes("cpu")
    options = argparse.Namespace(precision="bf16", device=device if processes == 1 else "cpu")
    model = build_model(backbones, options).train()
    model.encoder.to(device)
    model.feature_proj.to(device)
    model.config.train.shard = processes > 1
    set_activation_checkpointing(model.language_model, True)
    dataset = build_dataset(model, 1, 1)
    batch = as_batch([dataset[0]]).to(torch.device(device))
    expected = formula(model, processes)
    wrapped = wrap(accelerator, model)
    optimizer = torch.optim.AdamW([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-4)
    gc.collect()
    reset_peak(device)
    for _ in range(STEPS):
        loss = wrapped(batch, 1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        del loss
    peak = max(gather_object([peak_bytes(device) - before]))
    return {"processes": processes, "formula_mib": round(expected / 2**20), "peak_mib": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="half-b-24", help="default half-b-24")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--here", type=Path, help="measure in this process; for the command itself")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.here:
        found = measure(options.here)
        return write_report(found, options.output) if int(os.environ["RANK"]) == 0 else None
    if options.shape in NEEDS_CUDA and not torch.cuda.is_available():
        raise SystemExit(f"error: shape {options.shape} needs CUDA GPUs; --shape half-b-24 runs on a CPU")
    # as in train_step.py, measure the memory of tensors without glibc's cache
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    report: dict[str, Any] = {"shape": options.shape, "precision": "bf16", "results": []}
    with tempfile.TemporaryDirectory() as folder:
        backbones, file = write_backbones(Path(folder), options.shape), Path(folder) / "found.json"
        for processes in options.processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            here = ["-m", "benchmarks.sharded_memory", "--here", str(backbones), "--output", str(file)]
            words = [sys.executable, *launcher, *here]
            subprocess.run(words, cwd=REPO_ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
            report["results"].append(json.loads(file.read_text(encoding="utf-8")))
    write_report(report, options.output)


if __name__ == "__main__":
    main()
