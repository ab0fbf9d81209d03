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

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
VLLM = "VQA_VLLM_PYTHON"


def ask(address, questions):
    remote = RemoteAnswerer(address, model=NAME, settings=Generate(temperature=0))
    question = [remote.chat.question("What?", 0)]
    return [reply.text for reply in remote.answer_many(((), question) for _ in range(questions))]


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
    assert report["through our page"]["same answer as our engine"]
    assert report["exit status of predict.py"] == [0, 0]
