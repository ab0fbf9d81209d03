"""Which programs read an export, and by how much they differ from our model.

    python -m benchmarks.export_matrix --checkpoint DIR --run NAME=PYTHON … --output FILE.json [key=value …]

NAME is a program of `PROGRAMS`, PYTHON the interpreter of an environment that has it (docs/carrying.md says how to
make each, from benchmarks/consumers). The checkpoint is exported in float32 to each format that the program reads,
and again with each kind of quantised weights that the format has, if the program compares logits too. Rows of earlier
runs in FILE stay, unless program, format and version are the same. Each row has its date, and which checkpoint was
carried. Ends with status 1, after the last row, if a program fails or has another answer. Programs that compare
logits too may have another where `exporting/parity.py` allows it: for a tie, and with quantised weights.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from cli import run_script, script_arguments

import torch

from benchmarks.fleet import replica
from benchmarks.report import write_report
from benchmarks.soak import free_port
from config import parse_overrides
from errors import UserError
from export import OVERRIDES
from exporting.parity import compare
from exporting.targets import TARGETS
from exporting.write import Written, write_export
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import weights_digest

STOCK = ("llava", "vipllava")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "transformers": STOCK,
    "pipeline": STOCK,
    "vllm": ("llava",),
    "vllm_server": ("llava",),
    "lmms_eval": ("llava",),
    "trl": ("llava",),
    "onnx": ("onnx",),
    "openvino": ("openvino",),
    "llama.cpp": ("gguf",),
    "llama_cpp_python": ("gguf",),
}


def row(program: str, python: str, written: Written) -> dict[str, Any]:
    """Run a program on a folder; return what it differs by."""
    if program == TARGETS[written.target].program:
        report = compare(
            written.reference, written.folder, program, written.feature_error, python=python, weights=written.weights
        )
        found = {"versions": report.get("versions", {}), "problems": report["problems"]}
        if "questions" in report:
            questions = report["questions"]
            found["questions"] = len(questions)
            found["same answers"] = sum(question["same"] for question in questions)
            for key in ("features", "logits"):
                if any(key in question for question in questions):
                    found[key] = max(question.get(key, 0.0) for question in questions)
        return found
    if program != "vllm_server":
        return consumed(program, python, written)
    port = free_port()
    try:
        with replica(python, written.folder, port):
            return consumed(program, python, written, str(port))
    except SystemExit as error:  # it did not start; the text ends with its log
        return failed(str(error))


def failed(log: str) -> dict[str, Any]:
    """A row of a program that failed. The reason is in the last lines of what it wrote; pydantic has an advert last."""
    return {
        "versions": {},
        "problems": [" ".join(line.strip() for line in log.strip().splitlines()[-3:]) or "no output"],
    }


def consumed(program: str, python: str, written: Written, *more: str) -> dict[str, Any]:
    """Let a program of `export_consumers.py` answer; return what it differs by. `more` goes to its function."""
    script = Path(__file__).with_name("export_consumers.py")
    done = subprocess.run(
        [python, "-P", str(script), program, str(written.folder), str(written.reference.folder), *more],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return failed(done.stderr)
    result = json.loads((written.reference.folder / "consumer.json").read_text(encoding="utf-8"))
    found = {"versions": result["versions"], "problems": []}
    if "losses" in result:
        return found | {"losses": result["losses"]}
    expected = [written.reference.texts[number] for number in result["cases"]]
    pairs = [
        (ours, theirs) for answers in result["answers"].values() for ours, theirs in zip(expected, answers, strict=True)
    ]
    others = [theirs for ours, theirs in pairs if ours != theirs.strip()]
    found |= {"questions": len(pairs), "same answers": len(pairs) - len(others), "other answers": others}
    return found | {"problems": [f"{len(others)} of {len(pairs)} answers are others"] if others else []}


def replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a row of an earlier run is of the same program, format and versions, or of a run that failed."""
    if (old["program"], old["format"]) != (new["program"], new["format"]):
        return False
    return old["versions"] in ({}, new["versions"])


def main() -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=PYTHON", help="may be given several times"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json")
    args = parser.parse_intermixed_args()
    runs = [run.partition("=")[::2] for run in args.run]
    for name, python in runs:
        if name not in PROGRAMS:
            raise UserError(f"--run: {name} is not one of {', '.join(PROGRAMS)}")
        if shutil.which(python) is None:
            raise UserError(f"--run: {python} is no program, name the Python of an environment that has {name}")
    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.is_file() else []
    overrides = parse_overrides(args.overrides) | OVERRIDES
    carried = {"checkpoint": args.checkpoint.absolute().name, "weights": weights_digest(args.checkpoint)}
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = [(name, weights) for name, target in TARGETS.items() for weights in ("", *target.quantised)]
        for target, weights in kinds:
            compares = TARGETS[target].program  # others are asked for answers alone, which quantised weights change
            programs = [
                (name, python)
                for name, python in runs
                if target in PROGRAMS[name] and (not weights or name == compares)
            ]
            if not programs:
                continue
            label = f"{target} {weights}".strip()
            model = load_checkpoint(args.checkpoint.absolute(), device="cpu", dtype=torch.float32, overrides=overrides)
            written = write_export(model, Path(folder) / label, target, {}, weights)
            del model
            for program, python in programs:
                new = {"program": program, "format": label, "date": time.strftime("%Y-%m-%d")} | carried
                new |= row(program, python, written)
                rows = [old for old in rows if not replaces(new, old)]
                rows.append(new)
                problems += [f"{program}, {label}: {problem}" for problem in new["problems"]]
                write_report({"rows": rows}, args.output)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    run_script(main)
