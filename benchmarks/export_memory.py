"""Peak memory of `export.py` on random weights at the true layouts of public models.

    python -m benchmarks.export_memory [--shape half-b-24|so400m-1.5b|qwen-7b] [--dtype bfloat16] [--output FILE.json]

The language model has the widths, depth and vocabulary of Qwen2.5-0.5B, 1.5B or 7B, with LoRA of rank 16. Pictures are
small, so the comparison takes minutes on a CPU; its activations are then small beside the weights.
Memory is what the exporting process and the comparing process use together, without what Python and the libraries used
before the work began. `private` leaves out pages of files, which the system drops when memory is short. The largest
shape needs 17 GB of memory and 50 GB of disk.
"""

import argparse
import importlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.report import write_report
from benchmarks.train_sides import DEMO, LORA, SHAPES, write_backbones
from config import parse_config
from export import main as export_main
from model.checkpoint import save_checkpoint
from model.model import MMultiModal

PICTURE = 112  # pixels: 64 patches
BAR = 1.3  # times the weights
PAUSE = 0.02  # seconds between two looks at the memory


def write_checkpoint(folder: Path, shape: str) -> Path:
    """Write random backbones in bf16 and a checkpoint with LoRA on them."""
    layout = SHAPES[shape]
    write_backbones(folder, shape)
    _small_pictures(folder / "siglip", layout["vision"])
    config = parse_config(
        {
            "visual": {"path": str(folder / "siglip")},
            "llm": {"path": str(folder / "qwen"), "lora": LORA},
            "train": {"precision": "bf16"},
            "generate": {"max_new_tokens": 8},
        },
        "benchmark",
    )
    model = MMultiModal.from_config(config, device="cpu")
    save_checkpoint(model, folder / "checkpoint-1", {"step": 1}, {}, {})
    return folder / "checkpoint-1"


def _small_pictures(folder: Path, vision: dict[str, Any]) -> None:
    settings = SiglipVisionConfig(image_size=PICTURE, patch_size=14, **vision)
    SiglipVisionModel(settings).to(torch.bfloat16).save_pretrained(folder)
    raw = json.loads((DEMO / "siglip" / "preprocessor_config.json").read_text(encoding="utf-8"))
    raw["size"] = {"height": PICTURE, "width": PICTURE}
    (folder / "preprocessor_config.json").write_text(json.dumps(raw), encoding="utf-8")


def export(arguments: list[str], pipe) -> None:
    """Run the export in this process; libraries are imported first."""
    importlib.import_module("transformers.models.llava.modeling_llava")
    pipe.send("ready")
    pipe.recv()
    export_main(arguments)


def memory(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process, all and private ones; 0 once it is gone."""
    try:
        info = process.memory_info()
    except psutil.Error:
        return 0, 0
    return info.rss, info.rss - info.shared


def watch(worker: Any, pipe: Any) -> dict[str, Any]:
    """Let the export begin; return the peaks above the memory at that moment, in bytes."""
    pipe.recv()
    process = psutil.Process(worker.pid)
    before = memory(process)
    peaks = {"exporting": [0, 0], "together": [0, 0]}
    pipe.send("go")
    while worker.is_alive():
        own = memory(process)
        others = [memory(child) for child in process.children(recursive=True)]
        for kind in (0, 1):
            peaks["exporting"][kind] = max(peaks["exporting"][kind], own[kind] - before[kind])
            # the comparing process has the same libraries
            sums = own[kind] - before[kind] + sum(max(other[kind] - before[kind], 0) for other in others)
            peaks["together"][kind] = max(peaks["together"][kind], sums)
        time.sleep(PAUSE)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="half-b-24")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", choices=("llava", "vipllava"), default="llava")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder, options.shape)
        ours, theirs = context.Pipe()
        arguments = ["--checkpoint", str(checkpoint), "--output", str(folder / "out"), f"model_root={folder}"]
        arguments += ["--dtype", options.dtype, "--format", options.format]
        worker = context.Process(target=export, args=(arguments, theirs))
        began = time.perf_counter()
        worker.start()
        theirs.close()  # else nothing would tell `watch` that the export is gone
        peaks = watch(worker, ours)
        assert worker.exitcode == 0, "the export failed, see above"
        weights = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    ratios = {
        who: {"resident": round(peak[0] / weights, 3), "private": round(peak[1] / weights, 3)}
        for who, peak in peaks.items()
    }
    report = {"shape": options.shape, "dtype": options.dtype, "format": options.format, "bar": BAR}
    report |= {"weights_mib": round(weights / 2**20), "seconds": round(time.perf_counter() - began, 1)}
    report |= {"times_the_weights": ratios, "holds": ratios["together"]["resident"] <= BAR}
    write_report(report, options.output)


if __name__ == "__main__":
    main()
