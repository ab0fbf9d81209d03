"""Everything that needs a GPU, in one command of about ten minutes: precisions, speed, memory, answering.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json [--only seven_b …]

Each check of `gpu_checks.py` runs in a process of its own, so that one that fails leaves the others alone, and compares
its figures with bars. Without a GPU, bars of speed and memory do not count. Status 1 if a check fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu_checks import CHECKS, GPU
from benchmarks.report import write_report
from paths import REPO_ROOT

LIMIT_SECONDS = 240  # of one check


def run(name: str) -> dict[str, Any]:
    """Run a check in this process; return its status, bars and figures."""
    if name == "processes" and GPU and torch.cuda.device_count() < 2:
        return {"status": "skipped: one GPU only"}
    began = time.monotonic()
    figures, bars = CHECKS[name]()
    counting = [bar for bar in bars if GPU or bar.correctness]
    return {
        "status": "passed" if all(bar.met for bar in counting) else "failed",
        "seconds": round(time.monotonic() - began, 1),
        "bars": [
            {"name": bar.name, "value": bar.value, "at_least": bar.at_least, "at_most": bar.at_most, "met": bar.met}
            for bar in bars
        ],
        "figures": figures,
    }


def run_apart(name: str) -> dict[str, Any]:
    """Run a check in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "check.json"
        words = [sys.executable, "-m", "benchmarks.gpu", "--here", name, "--output", str(file)]
        try:
            done = subprocess.run(words, cwd=REPO_ROOT, check=False, timeout=LIMIT_SECONDS, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: longer than {LIMIT_SECONDS} seconds"}
        if done.returncode:
            return {"status": f"failed: status {done.returncode}, the reason is printed above"}
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="default: all")
    parser.add_argument("--here", choices=list(CHECKS), help="run this check in this process; for the command itself")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.here:
        return write_report(run(options.here), options.output)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if GPU else torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checks": {},
    }
    for name in options.only:
        report["checks"][name] = checked = run_apart(name)
        print(f"{name}: {checked['status']}", file=sys.stderr, flush=True)
        write_report(report, options.output)  # after each check: a command that is stopped leaves the others
    if any(checked["status"].startswith("failed") for checked in report["checks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
