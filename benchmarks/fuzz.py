"""Mutated inputs against the product: annotation files, photos, configs, and texts that imitate control tokens.

    python -m benchmarks.fuzz [--target annotations|photos|configs|injections|all] [--count N] [--seed S]
                              [--output FILE.json]
    python -m benchmarks.fuzz --target photos --case 17 [--seed S]     # one case again, in this process

A case is made from (seed, target, number) alone, so each one can be run again. A `UserError` is the right answer to a
wrong input; what counts as a failure is in `FAILURES`. Each worker is a process of its own, which is ended and started
anew where a case takes longer than its limit or ends the process. The exit status is 1 if any case failed.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fuzz_files import FoundError, annotations, photos
from benchmarks.fuzz_text import configs, injections
from errors import UserError, shortened

FAILURES = {
    "traceback": "an exception other than UserError",
    "hang": "longer than the limit",
    "crash": "the process ended",
    "unaccounted": "kept + dropped is not what was read, or the written files cannot be read back",
    "escaped": "a path in the image map outside the images folder",
    "control token": "a control token out of a user's text",
    "unclear message": "an error message of more than 5,000 characters",
    "foreign program": "a photo started an external program",
}
LONGEST_MESSAGE = 5000  # characters; ten mistakes of one config, each with a shortened value
EXAMPLES = 3  # per kind of failure; for tracebacks, per exception and place
LIBRARIES = ("orjson", "pillow", "pydantic", "PyYAML", "tokenizers", "torch", "transformers")

Case = Callable[[random.Random, Path], str]  # (draw, an empty folder) -> outcome in one word
Outcome = tuple[str, str]  # (a key of FAILURES, or any other word for success; details)


class Target(NamedTuple):
    case: Case
    count: int  # cases in a whole run
    limit: float  # seconds per case


TARGETS = {
    "annotations": Target(annotations, 10_000, 20),
    "photos": Target(photos, 1_000, 20),
    "configs": Target(configs, 2_000, 120),  # some start a script, which imports torch
    "injections": Target(injections, 500, 20),
}


def run_case(case: Case, name: str, seed: int, number: int) -> Outcome:
    """Run one case in a new folder; `name` of the target is part of its random seed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return case(random.Random(f"{seed}/{name}/{number}"), Path(folder)), ""
        except UserError as error:
            message = str(error)
            return ("refused" if len(message) <= LONGEST_MESSAGE else "unclear message"), message
        except FoundError as found:
            return found.kind, str(found)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
            return "traceback", f"{type(error).__name__}: {error} ({place})"


def _work(case: Case, name: str, seed: int, numbers: list[int], pipe: Connection) -> None:
    """Run cases in a worker process; send None when it is ready, and (number, outcome) after each case."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when a case imports it
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the process ends with it
    pipe.send(None)
    for number in numbers:
        kind, details = run_case(case, name, seed, number)
        pipe.send((number, (kind, shortened(details, 300))))


class _Worker:
    """One process for the cases `numbers`; after a hang or a crash, a new process continues."""

    def __init__(self, case: Case, name: str, seed: int, numbers: list[int]) -> None:
        self.arguments = (case, name, seed)
        self.left = numbers
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(*self.arguments, self.left, theirs))
        self.process.start()
        theirs.close()
        self.since: float | None = None  # start of the current case; None while the process imports libraries

    def outcome(self, limit: float) -> Outcome | None:
        """Return the outcome of the first case in `left`, or None if it is not known yet."""
        if self.pipe.poll():
            try:
                message = self.pipe.recv()
            except EOFError:
                self.process.join()
                return self._fail("crash", f"exit status {self.process.exitcode}")
            self.since = time.monotonic()
            if message is None:
                return None
            number, outcome = message
            assert number == self.left.pop(0)
            return outcome
        if self.since is not None and time.monotonic() - self.since > limit:
            self.process.kill()
            self.process.join()
            return self._fail("hang", f"more than {limit:.0f} s")
        return None

    def _fail(self, kind: str, details: str) -> Outcome:
        self.pipe.close()
        del self.left[0]
        if self.left:
            self.start()
        return kind, details


def run_target(name: str, target: Target, seed: int, count: int, processes: int) -> dict[str, Any]:
    """Run the cases 0 to `count` - 1 of a target.

    Returns:
        `{"cases", "seconds", "outcomes": {word: count}, "failures": {kind: count}, "examples": [{"case", "kind",
        "details"}]}`; every kind of `FAILURES` is in `failures`.
    """
    began = time.monotonic()
    shares = [list(range(first, count, processes)) for first in range(min(processes, count))]
    workers = [_Worker(target.case, name, seed, share) for share in shares]
    outcomes: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    examples = []
    while workers:
        wait([worker.pipe for worker in workers], timeout=0.5)
        for worker in workers:
            number = worker.left[0]
            outcome = worker.outcome(target.limit)
            if outcome is None:
                continue
            kind, details = outcome
            outcomes[kind] += 1
            place = f"{details.partition(':')[0]} {details.rpartition('(')[2]}" if kind == "traceback" else kind
            shown[place] += kind in FAILURES
            if kind in FAILURES and shown[place] <= EXAMPLES:
                examples.append({"case": number, "kind": kind, "details": details})
            if sys.stderr.isatty():
                print(f"\r{name}: {outcomes.total():,} of {count:,}", end="", file=sys.stderr, flush=True)
        for worker in [worker for worker in workers if not worker.left]:
            worker.process.join()
            workers.remove(worker)
    return {
        "cases": outcomes.total(),
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": {kind: number for kind, number in outcomes.most_common() if kind not in FAILURES},
        "failures": {kind: outcomes[kind] for kind in FAILURES},
        "examples": examples,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line per target with cases, seconds, failures and outcomes; then the examples."""
    lines = [f"{'target':12} {'cases':>7} {'seconds':>8} {'failures':>9}  outcomes"]
    for name, result in results.items():
        failed = sum(result["failures"].values())
        words = ", ".join(f"{kind} {count:,}" for kind, count in result["outcomes"].items())
        lines.append(f"{name:12} {result['cases']:>7,} {result['seconds']:>8.0f} {failed:>9,}  {words}")
    for name, result in results.items():
        counts = ", ".join(f"{kind} {count:,}" for kind, count in result["failures"].items() if count)
        if counts:
            lines.append(f"\n{name}: {counts}")
        for example in result["examples"]:
            lines.append(f"  --target {name} --case {example['case']}: {example['kind']}: {example['details']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["all", *TARGETS], default="all", help="what is damaged (default all)")
    parser.add_argument("--count", type=int, help="cases of each target (default " + _counts() + ")")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default 0)")
    parser.add_argument("--case", type=int, help="run this case of --target alone and show its traceback")
    parser.add_argument("--processes", type=int, default=2, help="workers (default 2)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.case is not None:
        if options.target == "all":
            parser.error("--case needs --target")
        _run_again(options.target, options.seed, options.case)
        return
    results = {}
    for name, target in TARGETS.items():
        if options.target in ("all", name):
            count = target.count if options.count is None else options.count
            results[name] = run_target(name, target, options.seed, count, options.processes)
    print(table(results))
    report = {
        "seed": options.seed,
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "failures": {kind: sum(result["failures"][kind] for result in results.values()) for kind in FAILURES},
        "targets": results,
    }
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise SystemExit(1 if any(report["failures"].values()) else 0)


def _counts() -> str:
    return ", ".join(f"{name} {target.count:,}" for name, target in TARGETS.items())


def _run_again(name: str, seed: int, number: int) -> None:
    """Run one case without catching its exception; keep its files."""
    folder = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"files: {folder}")
    try:
        print(TARGETS[name].case(random.Random(f"{seed}/{name}/{number}"), folder))
    except UserError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
