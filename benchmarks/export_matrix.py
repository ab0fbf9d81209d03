"""Which versions of transformers read an export, and by how much they differ from our model.

    python -m benchmarks.export_matrix --checkpoint DIR [--python PYTHON]... [--output FILE.json] [key=value …]

Writes the checkpoint in every format that holds it, and compares each folder in this Python and in the others named:
each may be that of a virtual environment with another version. A row is what `export_report.json` holds, summed up.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cli import run_script, script_arguments

import torch

from benchmarks.report import write_report
from config import parse_overrides
from errors import UserError
from export import OVERRIDES
from exporting.parity import compare
from exporting.targets import TARGETS
from exporting.write import write_export
from model.checkpoint import load_checkpoint


def rows(checkpoint: Path, pythons: list[str], overrides: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Export to `folder` in float32 and return one row for each format and interpreter."""
    found = []
    for target in TARGETS:
        model = load_checkpoint(checkpoint, device="cpu", dtype=torch.float32, overrides=overrides | OVERRIDES)
        try:
            written = write_export(model, folder / target, target, {})
        except UserError as error:
            found.append({"format": target, "refused": str(error)})
            continue
        del model
        for python in pythons:
            report = compare(written.reference, written.folder, written.feature_error, python)
            row = {"format": target, "problems": report["problems"]}
            if "questions" in report:
                questions = report["questions"]
                row |= {"versions": report["versions"], "questions": len(questions)}
                row["same answers"] = sum(question["same"] for question in questions)
                row |= {key: max(question.get(key, 0.0) for question in questions) for key in ("features", "logits")}
            found.append(row)
    return found


def main() -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--python", action="append", default=[], help="another interpreter; may be given several times")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        pythons = [sys.executable, *args.python]
        found = rows(args.checkpoint.absolute(), pythons, parse_overrides(args.overrides), Path(name))
    write_report({"date": time.strftime("%Y-%m-%d"), "rows": found}, args.output)


if __name__ == "__main__":
    run_script(main)
