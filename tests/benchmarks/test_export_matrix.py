"""The rows of the export matrix, without exports and programs."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import export_consumers, export_matrix
from benchmarks.soak import CHECKPOINT
from config import Generate
from model.checkpoint_folder import PROVENANCE_FILE, checksum
from tests.telling import NAME, TellingEngine, photo, running

OURS = ["a red circle", "two"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(*programs)`: the rows that the command writes, and what it ends with."""

    def matrix(*programs):
        for name in ("load_checkpoint", "write_export"):
            monkeypatch.setattr(export_matrix, name, lambda *_, **__: None)
        file = tmp_path / "matrix.json"
        options = ["--checkpoint", str(CHECKPOINT), "--output", str(file)]
        options += [option for program in programs for option in ("--run", f"{program}={sys.executable}")]
        monkeypatch.setattr("sys.argv", ["export_matrix", *options])
        problems = None
        try:
            export_matrix.main()
        except SystemExit as end:
            problems = end.code
        return json.loads(file.read_text(encoding="utf-8"))["rows"], problems

    return matrix


@pytest.fixture
def written(tmp_path):
    """An exported folder with two questions, of which nothing is read but our answers."""
    reference = SimpleNamespace(folder=tmp_path, texts=OURS)
    return SimpleNamespace(target="llava", weights="", folder=tmp_path / "model", reference=reference)


def answering(monkeypatch, tmp_path, answers):
    """Let a program give these answers."""
    result = {"versions": {"vllm": "1"}, "answers": {"engine": answers}, "cases": [0, 1]}

    def program(*_, **__):
        (tmp_path / "consumer.json").write_text(json.dumps(result), encoding="utf-8")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(export_matrix.subprocess, "run", program)


def test_a_row_tells_its_date_and_which_checkpoint_was_carried(monkeypatch, run, capsys):
    monkeypatch.setattr(export_matrix, "row", lambda *_: {"versions": {"vllm": "1"}, "problems": []})
    before = time.strftime("%Y-%m-%d")
    (row,), problems = run("vllm")
    assert problems is None
    assert row["date"] in (before, time.strftime("%Y-%m-%d"))
    assert row["checkpoint"] == CHECKPOINT.name
    assert row["weights"] == [checksum(CHECKPOINT / PROVENANCE_FILE)[:16]]


def test_another_answer_is_a_problem(monkeypatch, tmp_path, written):
    answering(monkeypatch, tmp_path, [OURS[0], "three"])
    row = export_matrix.row("vllm", "python", written)
    assert (row["same answers"], row["other answers"]) == (1, ["three"])
    assert row["problems"] == ["1 of 2 answers are others"]
    answering(monkeypatch, tmp_path, [f" {OURS[0]}\n", OURS[1]])
    assert export_matrix.row("vllm", "python", written)["problems"] == []


def test_a_program_with_a_problem_ends_the_command_with_status_1_after_all_rows(monkeypatch, run, capsys):
    rows = {"vllm": {"versions": {}, "problems": ["it cannot load"]}, "trl": {"versions": {"trl": "1"}, "problems": []}}
    monkeypatch.setattr(export_matrix, "row", lambda program, *_: rows[program])
    found, problems = run("vllm", "trl")
    assert [row["program"] for row in found] == ["vllm", "trl"]
    assert problems == "vllm, llava: it cannot load"


def test_a_server_that_does_not_start_is_a_problem(monkeypatch, written):
    def replica(*_):
        raise SystemExit("it did not start:\nsome log\nanError:\n  the reason\n  see https://…\n")

    monkeypatch.setattr(export_matrix, "replica", replica)
    assert export_matrix.row("vllm_server", "python", written) == export_matrix.failed(
        "anError: the reason see https://…"
    )


def test_the_server_is_asked_without_settings_of_sampling(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    case = {"photos": ["0-0.png"], "messages": [{"role": "user", "content": content}], "max_new_tokens": 5}
    (tmp_path / "cases.json").write_text(json.dumps([case]), encoding="utf-8")
    (tmp_path / "0-0.png").write_bytes(export_consumers.base64.b64decode(photo()["image_url"]["url"].split(",")[1]))
    engine, own = TellingEngine(), Generate(temperature=0.7, top_k=9)
    with running(engine, name=NAME, generate=own) as address:
        found = export_consumers.vllm_server(tmp_path / "model", tmp_path, address.rpartition(":")[2])
    assert found["answers"] == {"server": ["(4, 3) What is it?"]}
    asked = engine.asked[0][1]
    assert (asked.temperature, asked.top_k, asked.max_new_tokens) == (0.7, 9, 5)
