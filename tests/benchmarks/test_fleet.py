"""Two servers behind nginx, as docs/serving.md has them; the servers are our own here, for vLLM takes minutes."""

import json
import os
import shutil
from contextlib import ExitStack

import pytest
from PIL import Image

from answering.remote import RemoteAnswerer
from benchmarks import fleet
from benchmarks.fleet import page_answer, proxy, requests_to
from benchmarks.soak import free_port
from config import Generate
from tests.telling import NAME, TellingEngine, running

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
VLLM = "VQA_VLLM_PYTHON"


def ask(address, questions):
    remote = RemoteAnswerer(address, model=NAME, settings=Generate(temperature=0))
    question = [remote.chat.question("What?", 0)]
    return [reply.text for reply in remote.answer_many(((), question) for _ in range(questions))]


@needs_nginx
def test_both_are_asked_and_one_takes_over_when_the_other_goes(tmp_path):
    outside = free_port()
    address = f"http://127.0.0.1:{outside}"
    with ExitStack() as stack, running(TellingEngine()) as second:
        with running(TellingEngine()) as first:
            ports = [int(replica.rpartition(":")[2]) for replica in (first, second)]
            stack.enter_context(proxy(tmp_path / "nginx", outside, ports))
            assert ask(address, 20) == ["What?"] * 20
            counts = requests_to(tmp_path / "nginx", ports)
            assert sum(count["200"] for count in counts) == 20
            assert all(counts)
        assert ask(address, 5) == ["What?"] * 5
        counts = requests_to(tmp_path / "nginx", ports)
        assert sum(count["200"] for count in counts) == 25
        assert counts[0]["failed"] >= 1


@pytest.mark.nightly  # the page's start takes some seconds
def test_our_page_asks_the_server(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "photo.png")
    with running(TellingEngine(), name=fleet.NAME) as address:
        port = int(address.rpartition(":")[2])
        answer = page_answer(port, tmp_path / "photo.png", "What is it?", tmp_path / "page.log")
    assert answer == "(4, 3) What is it?"


@pytest.mark.nightly  # eval_vqa.py's start takes some seconds
def test_the_evaluation_asks_the_server(tmp_path):
    questions = fleet.write_questions(tmp_path / "data", 5)
    size = Image.open(questions.with_name(fleet.read(questions)[0]["image"])).size
    asked = [row["conversations"][0]["value"].replace("<image>", "").strip() for row in fleet.read(questions)]
    expected = [f"{size} {question}" for question in asked[:4]] + ["something else"]
    with running(TellingEngine(), name=fleet.NAME) as address:
        report = fleet.through_evaluation(int(address.rpartition(":")[2]), questions, expected, tmp_path)
    assert report == {"questions": 5, "answered": 5, "same answers as our engine": 4, "exit status": 0}


HALF = {
    "questions": 5,
    "same answers as our engine": 5,
    "requests to each replica, by status": [{"200": 2}, {"200": 3}],
}
GOOD = {
    "both up": HALF,
    "one killed": HALF,
    "through our page": {"answer": "red", "same answer as our engine": True},
    "through eval_vqa.py": {"questions": 5, "same answers as our engine": 5, "exit status": 0},
    "exit status of predict.py": [0, 0],
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"both up": HALF | {"same answers as our engine": 3}}, "both up: 2 of 5 answers are others or missing"),
        ({"one killed": HALF | {"same answers as our engine": 4}}, "one killed: 1 of 5"),
        ({"both up": HALF | {"requests to each replica, by status": [{"200": 5}, {}]}}, "a replica was not asked"),
        ({"through our page": {"answer": "", "same answer as our engine": False}}, "our page answers otherwise"),
        ({"through eval_vqa.py": GOOD["through eval_vqa.py"] | {"exit status": 1}}, "eval_vqa.py ended with status 1"),
        ({"exit status of predict.py": [0, 1]}, "predict.py ended with status 1"),
    ],
)
def test_what_goes_wrong_ends_with_status_1_behind_the_report(monkeypatch, tmp_path, capsys, wrong, message):
    monkeypatch.setattr(fleet.shutil, "which", lambda name: name)
    monkeypatch.setattr(fleet, "rounds", lambda *_: GOOD | wrong)
    file = tmp_path / "fleet.json"
    with pytest.raises(SystemExit, match=message):
        fleet.main(["--vllm", "python", "--output", str(file)])
    assert json.loads(file.read_text(encoding="utf-8")) == GOOD | wrong
    monkeypatch.setattr(fleet, "rounds", lambda *_: GOOD)
    fleet.main(["--vllm", "python"])


@needs_nginx
@pytest.mark.nightly  # vLLM loads for minutes
@pytest.mark.skipif(VLLM not in os.environ, reason=f"{VLLM} does not name the Python of an environment that has vLLM")
def test_vllm_behind_nginx_and_our_page_give_our_answers(tmp_path):
    """The walk-through of docs/serving.md from the export on."""
    file = tmp_path / "fleet.json"
    fleet.main(["--vllm", os.environ[VLLM], "--questions", "20", "--output", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    for half in (report["both up"], report["one killed"]):
        assert half["errors"] == []
        assert half["answered"] == half["same answers as our engine"] == half["questions"] == 20
