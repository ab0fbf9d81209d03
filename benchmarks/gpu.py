"""Everything that needs a GPU, in one command of at most ten minutes: precisions, speed, memory, answering.

    python -m benchmarks.gpu --output gpu.json [--only seven_b …]

Each check of `gpu_checks.py` runs in a process of its own, so that one that fails leaves the others alone, and compares
its figures with bars. Checks without figures in `benchmarks/results/gpu.json` come first; those for which no time is
left are not run. Without a GPU, bars of speed and memory do not count, and what cannot be measured is null.
Status 1 if a check fails or is not run.
"""

import argparse
import collections
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.gpu_checks import CHECKS, GPU
from benchmarks.report import write_report
from paths import REPO_ROOT

LIMIT_SECONDS = 240  # of one check
TOTAL_SECONDS = 580  # of all checks; the rest of ten minutes is for the imports before the first
MEASURED = REPO_ROOT / "benchmarks" / "results" / "gpu.json"
NOT_RUN = "not run: the time was over"


def run(name: str) -> dict[str, Any]:
    """Run a check in this process; return its status, bars and figures."""
    if name == "processes" and GPU and torch.cuda.device_count() < 2:
        return {"status": "skipped: one GPU only"}
    if name == "pinned" and not GPU:
        return {"status": "skipped: without a GPU there is nothing to copy to"}
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


def in_order(names: list[str]) -> list[str]:
    """Put those without figures in the committed report first."""
    checks = json.loads(MEASURED.read_text(encoding="utf-8"))["checks"]
    return sorted(names, key=lambda name: "figures" in checks.get(name, {}))


def status_within(words: list[str], seconds: float) -> int | None:
    """Run a program; return its status, None if it was ended, with all its children, after `seconds`."""
    process = psutil.Popen(words, cwd=REPO_ROOT, stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except psutil.TimeoutExpired:
        return None
    finally:
        if process.is_running():  # also after Ctrl-C
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def run_apart(name: str, seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Run a check in a process of its own, for at most `seconds`; below its limit, these are the rest of the time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "check.json"
        words = [sys.executable, "-m", "benchmarks.gpu", "--here", name, "--output", str(file)]
        status = status_within(words, seconds)
        if status is None:
            whole = seconds >= LIMIT_SECONDS
            return {"status": f"failed: longer than {LIMIT_SECONDS} seconds" if whole else NOT_RUN}
        if status:
            return {"status": f"failed: status {status}, the reason is printed above"}
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
    deadline = time.monotonic() + TOTAL_SECONDS
    for name in in_order(options.only):
        left = deadline - time.monotonic()
        checked = run_apart(name, min(left, LIMIT_SECONDS)) if left > 0 else {"status": NOT_RUN}
        report["checks"][name] = checked
        print(f"{name}: {checked['status']}", file=sys.stderr, flush=True)
        write_report(report, options.output)  # after each check: a command that is stopped leaves the others
    # "passed", "failed", "skipped" or "not run"
    counts = collections.Counter(checked["status"].partition(":")[0] for checked in report["checks"].values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()), file=sys.stderr)
    if counts["failed"] or counts["not run"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
