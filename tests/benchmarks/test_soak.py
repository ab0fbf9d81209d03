"""The soak of `benchmarks/soak.py` in small, and that it recognises what must not happen."""

import random
import sys

import pytest

from benchmarks.soak import run
from benchmarks.soak_client import KINDS, QUESTIONS, Services, Session, UnexpectedError


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM and process groups")
def test_many_clients_get_their_own_answers(tmp_path):
    report = run(60, 6, 1, tmp_path)
    assert report["problems"] == []
    assert (report["wrong answers"], report["leaks"], report["uploads left"]) == (0, 0, 0)
    assert set(report["answers"]) == {kind for kind in KINDS if "garbage" not in kind} | {"page alone"}
    assert sum(report["refusals"].values()) >= 10


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "new_page", lambda self: None)
    services = Services(None, "", "checkpoint", tmp_path)
    services.descriptions = ["north: red circle.", "south: blue cross."]
    session = Session(services, [], random.Random(0))
    session.expected = dict.fromkeys(QUESTIONS, "2") | {"describe": "north: red circle."}
    return session


@pytest.mark.parametrize(
    ("text", "wrong", "leaks"), [("north: red circle.", 0, 0), ("north: red", 1, 0), ("south: blue cross.", 1, 1)]
)
def test_another_answer_is_wrong_and_another_clients_answer_is_a_leak(session, monkeypatch, text, wrong, leaks):
    monkeypatch.setattr(Session, "whole", lambda self, kind: self.answered(kind, "describe", text))
    session.request("whole")
    tally = session.services.tally
    assert (tally.wrong, tally.leaks, len(tally.problems), tally.answers["whole"]) == (wrong, leaks, wrong, 1 - wrong)


@pytest.mark.parametrize(
    ("status", "sentence"), [(500, "busy"), (400, ""), (400, "Traceback (most recent"), (200, "ok")]
)
def test_a_refusal_without_words_is_a_problem(session, status, sentence):
    session.refused("broken JSON", 400, "not valid JSON")
    with pytest.raises(UnexpectedError):
        session.refused("broken JSON", status, sentence)
