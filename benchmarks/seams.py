"""Train the demo once with each projector, and on small things with and without tiles: accuracy, tokens, time a step.

    python -m benchmarks.seams --output benchmarks/results/seams.json
    python -m benchmarks.seams --sides --pairs 3 --output benchmarks/results/seams_step.json

Every side goes through the scripts as a person would: process_image.py, train.py, eval_vqa.py. Features are cached in
all of them, so a step is projector and language model. The two sides on small things start from the checkpoint of
`pixel_shuffle 3`, because their questions alone (no captions, no places) teach no projector to see. Takes 30 to 45
minutes on two cores.

`--pairs` times a step of `mlp` and of `pixel_shuffle 3` in turns, because the speed of a shared machine changes more
between two trainings than the ratio of two kinds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import run_script

from model.checkpoint_folder import list_checkpoints
from paths import REPO_ROOT

PHOTOS, SMALL_PHOTOS = 1200, 600
STEPS = 14  # of each short training; the first two do not count
# the demo's questions are about single objects, so the mean of all patches only stands in the way
PIXEL_SHUFFLE = ["projector.kind=pixel_shuffle", "projector.mean_share=0", "visual.image_tokens=81"]
START = "pixel_shuffle 3"  # the side that the sides on small things start from
# side → (small things, overrides of configs/demo.yaml). Fewer tokens need more steps, and these steps are shorter: the
# first three sides train for about the same time.
SIDES: dict[str, tuple[bool, list[str]]] = {
    "mlp": (False, []),
    START: (False, [*PIXEL_SHUFFLE, "train.max_steps=800"]),
    "resampler 64": (False, ["projector.kind=resampler", "visual.image_tokens=64", "train.max_steps=800"]),
    "small things, whole photo": (True, [*PIXEL_SHUFFLE, "train.max_steps=150"]),
    "small things, tiles 4": (True, [*PIXEL_SHUFFLE, "train.max_steps=150", "visual.tiles=4"]),
}


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=REPO_ROOT, check=True)


def prepare(folder: Path, small: bool) -> list[str]:
    """Draw a world into `folder` and prepare it; return the overrides for this data set."""
    photos = SMALL_PHOTOS if small else PHOTOS
    run("-m", "demo.make_data", "--output", folder, "--photos", str(photos), *(["--small"] if small else []))
    sources = [{"name": "questions", "format": "llava", "annotations": str(folder / "llava/annotations.json"),
                "images": str(folder / "llava/photos")}]  # fmt: skip
    if not small:
        sources.append({"name": "captions", "format": "ai_challenger", "images": str(folder / "ai_challenger/photos"),
                        "annotations": str(folder / "ai_challenger/annotations.json")})  # fmt: skip
    overrides = [
        f"data.sources={json.dumps(sources)}",
        f"data.image_map={folder / 'image_map.json'}",
        f"data.captions={folder / 'captions.json'}",
        f"data.feature_cache={folder / 'features'}",
    ]
    run("process_image.py", "--config", "configs/demo.yaml", *overrides)
    return overrides


def measure(folder: Path, overrides: list[str]) -> dict:
    """Train and score one side in `folder`; return its figures."""
    run("train.py", "--config", "configs/demo.yaml", f"train.output_dir={folder}", "train.log_steps=1", *overrides)
    checkpoint = list_checkpoints(folder)[-1]
    data = [override for override in overrides if override.startswith("data.")]
    run("eval_vqa.py", "--checkpoint", checkpoint, "--baselines", "blind", *data)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    passes = json.loads((checkpoint / "eval_val" / "metrics.json").read_text(encoding="utf-8"))["passes"]
    scores = passes["trained"]
    tokens = statistics.mean(line["tokens_per_second"] * line["seconds"] for line in lines)
    return {
        "accuracy": round(scores["overall"]["accuracy"], 3),
        "blind": round(passes["blind"]["overall"]["accuracy"], 3),
        "by_type": {kind: round(score["accuracy"], 3) for kind, score in scores["by_type"].items()},
        "seconds_a_step": round(statistics.median(line["seconds"] for line in lines[2:]), 3),
        "tokens_a_step": round(tokens),
        "val_loss": round(lines[-1]["val_loss"], 3),
        "steps": lines[-1]["step"],
        "minutes": round(sum(line["seconds"] for line in lines) / 60, 1),
    }


def step_ratio(folder: Path, data: list[str], pairs: int) -> dict:
    """Train `mlp` and `pixel_shuffle 3` in turns for a few steps; return seconds a step and their ratio."""
    seconds: dict[str, list[float]] = {"mlp": [], START: []}
    for number in range(pairs):
        for side, values in seconds.items():
            output = folder / f"turn{number}-{side}"
            short = [
                f"train.max_steps={STEPS}",
                "train.eval_steps=null",
                "train.log_steps=1",
                f"train.output_dir={output}",
            ]
            run("train.py", "--config", "configs/demo.yaml", *data, *SIDES[side][1], *short)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            values.append(statistics.median(line["seconds"] for line in lines[2:STEPS]))
    ratios = [mlp / short for mlp, short in zip(*seconds.values(), strict=True)]
    rounded = {side: [round(value, 3) for value in values] for side, values in seconds.items()}
    return {"seconds_a_step": rounded, "times_faster": round(statistics.median(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="default all")
    parser.add_argument("--pairs", type=int, default=0, help="short trainings of mlp and pixel_shuffle 3 in turns")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", help="more overrides, of all sides (train.max_steps=20)")
    options = parser.parse_args()
    needs_start = any(SIDES[side][0] for side in options.sides)
    sides = [side for side in SIDES if side in options.sides or (side == START and needs_start)]
    results, data = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, side in enumerate(sides):
            small, overrides = SIDES[side]
            if small:
                start = Path(folder) / f"run{sides.index(START)}"
                overrides = [*overrides, f"train.init_from={list_checkpoints(start)[-1]}"]
            if small not in data:
                data[small] = prepare(Path(folder) / f"data{int(small)}", small)
            results[side] = measure(Path(folder) / f"run{number}", [*data[small], *overrides, *options.overrides])
            print(f"{side}: {json.dumps(results[side])}", flush=True)
        ratio = {}
        if options.pairs:
            data[False] = data.get(False) or prepare(Path(folder) / "data0", small=False)
            ratio = {"in_turns": step_ratio(Path(folder), [*data[False], *options.overrides], options.pairs)}
            print(json.dumps(ratio), flush=True)
    report = {"machine": platform.processor() or platform.machine(), "sides": results} | ratio
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
