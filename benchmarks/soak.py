"""Ask `serve.py` and the page many mixed questions at once, and compare each answer with the one that was given alone.

    python -m benchmarks.soak --requests 500 --clients 16 --output benchmarks/results/soak.json

Both programs run as for a user, each with the demo's checkpoint and on a free port of 127.0.0.1. Every client has drawn
photos whose descriptions differ from those of all others, so an answer to another client's question is recognised.
Requests come in random order: whole and streamed answers, several photos, dialogues, the page's endpoints, clients
that leave in the middle, garbage (`soak_client.py`). Memory is measured at rest, after each fifth of the requests. Ends
with status 1 if there is any problem. Linux and macOS.
"""

import argparse
import collections
import contextlib
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
from tqdm import tqdm

from benchmarks.report import write_report
from benchmarks.soak_client import KINDS, PATIENCE, QUESTIONS, Services, Session, SoakTally
from demo.world import Scene, description, draw, random_scene
from paths import REPO_ROOT

CHECKPOINT = REPO_ROOT / "demo" / "checkpoint"
# little room, so that some requests are refused
LIMITS = ("--max-queue", "6", "--max-request-mb", "2", "--max-megapixels", "8")
PARTS = 5  # of the requests; the memory is measured after each
CACHE = "gui.cache_mb=64"  # 28 dialogues, so that kept prompts stop becoming more long before the end
WARM_UP = 3  # parts in which freed blocks of memory may still become more
START_SECONDS, REST_SECONDS, END_SECONDS = 600, 10, 60
MOST_GROWTH = 0.05  # of the memory
FEWEST_FOR_GROWTH = 500  # requests; the parts of a shorter run are all warm-up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(
    command: list[str], port: int, log: Path, seconds: float = START_SECONDS, **environment: str
) -> Iterator[subprocess.Popen]:
    """Run a program, and go on when it can be reached at `port` of 127.0.0.1; end it and its children afterwards.

    Raises:
        SystemExit: it does not get there within `seconds`; the message has the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPO_ROOT, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until(lambda: reachable(port) or process.poll() is not None, seconds)
        if not reachable(port):
            raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        yield process
    finally:
        ended(process)
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a program of `started` and all its children, if they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ended(process: subprocess.Popen) -> int | None:
    """Send SIGTERM; return the exit status, None if the process is still there after `END_SECONDS`."""
    process.terminate()
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def until(condition: Callable[[], bool], seconds: float = END_SECONDS) -> bool:
    """Return whether the condition comes true within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def draw_photos(folder: Path, clients: int, rng: np.random.Generator) -> list[Path]:
    """Write two photos for each client and one for all; those that clients describe have different descriptions."""
    seen: set[str] = set()
    files = []
    for number in range(2 * clients + 1):
        scene: Scene = random_scene(rng)
        while description(scene) in seen or len(scene) > 4:  # the answers about five things take longest
            scene = random_scene(rng)
        seen.add(description(scene))
        files.append(folder / f"{number}.jpg")
        draw(scene, rng).save(files[-1], quality=92)
    return files


def storm(sessions: list[Session], kinds: list[str]) -> None:
    """Make the requests, all clients at once."""
    with ThreadPoolExecutor(len(sessions)) as pool, tqdm(total=len(kinds), unit="request", dynamic_ncols=True) as bar:

        def work(session: Session, own: list[str]) -> None:
            for kind in own:
                session.request(kind)
                bar.update()

        begun = [pool.submit(work, session, kinds[n :: len(sessions)]) for n, session in enumerate(sessions)]
        for each in begun:
            each.result()


def idle(http: httpx2.Client) -> bool:
    lines = http.get("/metrics").text.splitlines()
    return {"vqa_running 0.0", "vqa_waiting 0.0"} <= set(lines)


def at_rest(http: httpx2.Client, programs: dict[str, subprocess.Popen], problems: list[str]) -> dict[str, float]:
    """Wait until nothing is answered; return the resident memory of each program in MiB."""
    if not until(lambda: idle(http), PATIENCE):
        problems.append("requests that were left are still answered")
    time.sleep(REST_SECONDS)
    return {name: psutil.Process(each.pid).memory_info().rss / 2**20 for name, each in programs.items()}


def run(requests: int, clients: int, seed: int, folder: Path) -> dict[str, Any]:
    """Start both programs, ask, and end them; return the report."""
    ports = [free_port(), free_port()]
    serve = [sys.executable, "serve.py", "--checkpoint", str(CHECKPOINT), "--port", str(ports[0]), *LIMITS, CACHE]
    page = [
        sys.executable,
        "test_gui.py",
        "--checkpoint",
        str(CHECKPOINT),
        f"gui.port={ports[1]}",
        "gui.max_upload_mb=1",
        CACHE,
    ]
    temporary = folder / "temporary"
    temporary.mkdir()
    logs = [folder / "serve.log", folder / "page.log"]
    with (
        started(serve, ports[0], logs[0]) as server,
        started(page, ports[1], logs[1], TMPDIR=str(temporary)) as pages,
        httpx2.Client(base_url=f"http://127.0.0.1:{ports[0]}", trust_env=False, timeout=PATIENCE) as http,
    ):
        photos = draw_photos(folder, clients, np.random.default_rng(seed))
        services = Services(http, f"http://127.0.0.1:{ports[1]}/", CHECKPOINT.name, photos.pop())
        report = soak(services, {"serve.py": server, "test_gui.py": pages}, photos, requests, seed, temporary)
        report["exit status after SIGTERM"] = {"serve.py": ended(server), "test_gui.py": ended(pages)}
    problems = report["problems"]
    if set(report["exit status after SIGTERM"].values()) != {0}:
        problems.append("a program does not end with status 0")
    problems += [f"left behind: {path.name}" for path in temporary.glob("vqa-*")]
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        problems += [f"{log.name}: {text[text.index('Traceback') :][:2000]}"] if "Traceback" in text else []
    return report


def soak(
    services: Services,
    programs: dict[str, subprocess.Popen],
    photos: list[Path],
    requests: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Ask each question alone, then all at once; return the report, still without the end of the programs.

    Args:
        folder: of the page's temporary files.
    """
    tally, problems, choose = services.tally, services.tally.problems, random.Random(seed)
    files_before = uploads(folder)
    sessions = [
        Session(services, photos[n : n + 2], random.Random(f"{seed} {n}")) for n in range(0, len(photos), 2)
    ]  # fmt: skip
    ask_alone(services, sessions)
    kinds = [kind for kind, often in KINDS.items() for _ in range(often)]
    kinds = [kinds[number % len(kinds)] for number in range(requests)]
    choose.shuffle(kinds)
    began = time.monotonic()
    memory: dict[str, list[float]] = {name: [] for name in programs}
    for part in range(PARTS):
        storm(sessions, kinds[part::PARTS])
        for name, used in at_rest(services.http, programs, problems).items():
            memory[name].append(used)
    minutes = (time.monotonic() - began - PARTS * REST_SECONDS) / 60
    growth = {name: max(used[WARM_UP - 1 :]) / used[WARM_UP - 1] - 1 for name, used in memory.items()}
    if requests >= FEWEST_FOR_GROWTH:
        problems += [f"{name} grew by {more:.1%}" for name, more in growth.items() if more > MOST_GROWTH]
    during = tally.answers.copy()
    storm(sessions[:3], ["whole", "stream", "page answer"])  # both still answer
    for session in sessions:
        session.page.close()
    until(lambda: uploads(folder) <= files_before)
    left = uploads(folder) - files_before
    problems += [f"not removed: {path.name}" for path in left]
    grown = {
        name: {"MiB after each part": [round(each) for each in used], "growth": round(growth[name], 4)}
        for name, used in memory.items()
    }
    report = {"requests": requests, "clients": len(sessions), "seed": seed, "minutes": round(minutes, 1)}
    return (
        report | figures(tally, during, requests) | {"memory": grown, "uploads left": len(left), "problems": problems}
    )


def ask_alone(services: Services, sessions: list[Session]) -> None:
    """Ask every question of every client alone, first the server; the page must give the same answers."""
    for session in tqdm(sessions, desc="alone", dynamic_ncols=True):
        for name in QUESTIONS:
            known = name == "shared photo" and session is not sessions[0]
            session.expected[name] = sessions[0].expected[name] if known else session.ask(name)
    services.descriptions = [session.expected["describe"] for session in sessions]
    if len(set(services.descriptions)) < len(sessions):
        services.tally.problems.append("two photos get one description: choose another seed")
    for session in sessions:
        storm([session], ["page alone"])
    services.tally.seconds.clear()


def figures(tally: SoakTally, answers: collections.Counter[str], requests: int) -> dict[str, Any]:
    """Return what the clients counted, and the machine."""
    seconds = [took for took, _ in tally.seconds[:requests]]
    longest = {kind: round(max((took for took, own in tally.seconds if own == kind), default=0), 1) for kind in KINDS}
    return {
        "answers": dict(sorted(answers.items())),
        "refusals": dict(sorted(tally.refusals.items())),
        "busy, asked again": tally.busy,
        "wrong answers": tally.wrong,
        "leaks": tally.leaks,
        "seconds, median": round(statistics.median(seconds), 1),
        "seconds, longest": longest,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
    }


def uploads(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="default 500")
    parser.add_argument("--clients", type=int, default=16, help="default 16")
    parser.add_argument("--seed", type=int, default=0, help="of photos and requests")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = run(options.requests, options.clients, options.seed, Path(folder))
    write_report(report, options.output)
    if report["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
