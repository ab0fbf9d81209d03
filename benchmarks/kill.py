"""Kill training at random moments and compare the result with an uninterrupted run, bit for bit.

    python -m benchmarks.kill --kills 50 --output benchmarks/results/kill.json

Each run is `train.py --resume auto` on the demo's backbones and a few drawn photos, with dropout, saving at every step.
Half of the kills (SIGKILL to the whole process group) come while a checkpoint is being written, the others at a random
time after the start. A run is resumed until it ends; then its weights and every logged loss must equal those of
the run that was left alone. Linux and macOS.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.report import write_report
from dataset.records import write_records
from model.checkpoint_folder import damage, list_checkpoints
from paths import REPO_ROOT

STEPS = 12
COMPARED = ("loss", "grad_norm", "projector_lr", "lora_lr", "supervised_tokens", "epoch")  # figures that must be equal
KILLS_PER_RUN = 5
WRITING = "while a checkpoint was written"
WRITING_SECONDS = 0.01  # writing a checkpoint of these small models takes about 20 ms
LATEST_KILL = 1.2  # as a multiple of the duration of an uninterrupted run
SETTINGS = {
    "data.val_fraction": 0.3,
    "visual.path": "demo/backbones/siglip",
    "llm.path": "demo/backbones/qwen",
    "llm.lora.r": 4,
    "llm.lora.dropout": 0.1,
    "train.precision": "float32",
    "train.max_steps": STEPS,
    "train.micro_batch": 1,
    "train.workers": 1,
    "train.save_steps": 1,
    "train.eval_steps": 4,
    "train.log_steps": 1,
    "train.trackers": "[]",
}


def draw_data(folder: Path) -> None:
    """Write eight single-colour photos with two questions each."""
    image_map, captions = {}, {}
    for ID in range(8):
        file = folder / f"{ID}.png"
        Image.new("RGB", (96, 96), (30 * ID, 255 - 30 * ID, 128)).save(file)
        image_map[file.name] = {"ID": ID, "image_file": file.name, "path": str(file)}
        questions = ("How red is it?", "How green is it?")
        captions[str(ID)] = [{"source": "kill", "q": f"<|extra_0|>\n{q}", "a": [str(ID)]} for q in questions]
    write_records(image_map, captions, folder / "image_map.json", folder / "captions.json")


def start(data: Path, output: Path) -> subprocess.Popen:
    """Start or resume a run in a separate process group."""
    settings = SETTINGS | {
        "data.image_map": data / "image_map.json",
        "data.captions": data / "captions.json",
        "train.output_dir": output,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "train.py", "--config", "configs/demo.yaml", "--resume", "auto", *overrides]
    log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115 - the process keeps it
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPO_ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def is_writing(output: Path) -> bool:
    """Return whether an unfinished checkpoint with a temporary name exists."""
    return any(output.glob("checkpoint-*.tmp"))


def kill_at(process: subprocess.Popen, output: Path, writing: bool, delay: float, first: list[Path]) -> str | None:
    """Kill the process `delay` seconds after its start or, if `writing`, after it started to write a checkpoint.

    Returns:
        The activity of the process; None if it had already ended.
    """
    began = time.perf_counter()
    for begun in (False, True) if writing else ():  # first wait until the rest of an earlier kill is deleted
        while process.poll() is None and is_writing(output) != begun:
            time.sleep(0.0005)
    if writing:
        began = time.perf_counter()
    while process.poll() is None and time.perf_counter() - began < delay:
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if is_writing(output):
        return WRITING
    return "between checkpoints" if list_checkpoints(output) != first else "before the next checkpoint"


def difference(output: Path, reference: Path) -> list[str]:
    """Return the differences between a finished run and the reference."""
    problems = []
    folder, expected = (path / f"checkpoint-{STEPS}" for path in (output, reference))
    for name in ("feature_proj.safetensors", "adapter_model.safetensors"):
        own, theirs = load_file(folder / name), load_file(expected / name)
        problems += [f"{name}: {key}" for key in theirs if not torch.equal(own[key], theirs[key])]
    own, theirs = (
        [{"step": line["step"]} | {key: line[key] for key in COMPARED} for line in map(json.loads, text.splitlines())]
        for text in ((path / "metrics.jsonl").read_text() for path in (output, reference))
    )
    problems += [] if own == theirs else ["metrics.jsonl"]
    problems += [f"left behind: {path.name}" for path in output.iterdir() if path.suffix in (".tmp", ".old")]
    return problems + [f"{path.name}: {problem}" for path in list_checkpoints(output) for problem in damage(path)]


def run(kills: int, seed: int) -> dict:
    """Kill and resume until `kills` kills are made and every run has ended; return the figures of the report."""
    choose = random.Random(seed)
    moments: dict[str, int] = {}
    problems: list[str] = []
    runs = made = 0
    with tempfile.TemporaryDirectory() as name, tqdm(total=kills, unit="kill", dynamic_ncols=True) as bar:
        folder = Path(name)
        draw_data(folder)
        reference = folder / "reference"
        began = time.perf_counter()
        if start(folder, reference).wait():
            raise SystemExit(reference.with_suffix(".log").read_text()[-3000:])
        seconds = time.perf_counter() - began
        while made < kills:
            runs += 1
            output = folder / f"run-{runs}"
            for _ in range(min(KILLS_PER_RUN, kills - made)):
                writing = moments.get(WRITING, 0) <= made / 2
                delay = choose.uniform(0, WRITING_SECONDS if writing else LATEST_KILL * seconds)
                process = start(folder, output)
                moment = kill_at(process, output, writing, delay, list_checkpoints(output))
                if moment is None:
                    break
                made += 1
                moments[moment] = moments.get(moment, 0) + 1
                bar.update()
            status = start(folder, output).wait()
            found = difference(output, reference) if status == 0 else [f"exit status {status}"]
            problems += [f"run {runs}: {problem}" for problem in found]
            if found:
                print(output.with_suffix(".log").read_text()[-2000:], file=sys.stderr)
            shutil.rmtree(output)
    return {
        "kills": made,
        "runs": runs,
        "seed": seed,
        "moments": moments,
        "steps": STEPS,
        "problems": problems,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    result = run(options.kills, options.seed)
    write_report(result, options.output)
    if result["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
