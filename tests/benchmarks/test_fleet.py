"""Two servers behind nginx, as docs/serving.md has them; the servers are our own here, for vLLM takes minutes."""

import shutil
from contextlib import ExitStack

import pytest

from answering.remote import RemoteAnswerer
from benchmarks.fleet import proxy, requests_to
from benchmarks.soak import free_port
from config import Generate
from tests.telling import NAME, TellingEngine, running

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")


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
