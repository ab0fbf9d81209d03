"""A try of the real run: trains, goes on after an interruption, scores, and replaces its row in the table."""

import json
import os
import re
import shlex
import sys

import pytest
import torch
from PIL import Image

from benchmarks import real_run
from config import load_config
from errors import UserError
from paths import REPO_ROOT
from tests.tiny import tiny_config


@pytest.fixture
def command(workshop, tmp_path, monkeypatch):
    """Run one try with more arguments; return its row."""
    config = tiny_config(workshop, train={"output_dir": str(tmp_path / "run"), "max_steps": 3, "log_steps": 1})
    (tmp_path / "run.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    colours = {1: "red", 2: "blue"}
    for number, colour in colours.items():
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{number}.jpg")
    held_out = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in colours],
        "annotations": [{"id": number, "image_id": number, "caption": colour} for number, colour in colours.items()],
    }
    (tmp_path / "val.json").write_text(json.dumps(held_out), encoding="utf-8")

    def run(*more):
        options = ["--config", tmp_path / "run.yaml", "--annotations", tmp_path / "val.json", "--images", tmp_path]
        options += ["--output", tmp_path / "table.json"]
        monkeypatch.setattr(sys, "argv", ["real_run", *map(str, options), *more])
        real_run.main()
        return json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.nightly  # starts six programs
def test_a_try_is_trained_scored_and_written_down(command, tmp_path):
    (row,) = command("first", "train.max_steps=2")
    assert row["training"]["steps"] == 2
    assert row["training"]["seconds"] > 0
    assert set(row["scores"]["passes"]) == {"trained", "blind", "text", "untrained", "majority"}
    assert row["scores"]["questions"] == 2
    assert row["scores"]["computed"] == "float32 on cpu"
    assert len(row["checkpoint"]["weights"]) == 1
    assert row["command"].startswith(f"python -m benchmarks.real_run first --config {tmp_path}/run.yaml --minutes 120 ")
    assert row["command"].endswith("train.max_steps=2")
    (again,) = command("first", "--minutes", "0", "train.max_steps=3")  # the time is over: no third step
    assert again["training"] == row["training"]
    further = command("second", "train.max_steps=3")
    assert [(other["name"], other["training"]["steps"]) for other in further] == [("first", 2), ("second", 3)]
    assert further[1]["training"]["seconds"] > row["training"]["seconds"]
    rows = [{"image_id": f"{number}.jpg", "caption": ["红色的墙", "一面墙"]} for number in (1, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    chinese = command("chinese", "train.max_steps=3", "--annotations", str(tmp_path / "rows.json"))[-1]
    assert chinese["scores"]["questions"] == 2
    assert "characters" in chinese["scores"]["passes"]["trained"]["captions"]


@pytest.mark.nightly  # starts seven programs
def test_a_try_trains_in_two_processes(command, tmp_path):
    (row,) = command("both", "--processes", "2")
    assert row["processes"] == 2
    assert row["training"]["steps"] == 3
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "trainer_state" / "state.pt", weights_only=True)
    assert state["processes"] == 2


def test_the_config_of_the_best_run_is_what_its_row_trained():
    rows = json.loads(real_run.RESULTS.read_text(encoding="utf-8"))
    words = shlex.split(next(row["command"] for row in rows if row["name"] == "light-both-languages"))
    overrides = [word for word in words[words.index("--images") + 2 :] if "=" in word]
    trained = load_config(words[words.index("--config") + 1], overrides)
    shipped = load_config(
        "configs/flickr8k_daquar_light.yaml", {"train.epochs": trained.train.epochs}
    )  # max_steps rules
    assert shipped == trained


def numbers_in(value):
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("page", ["docs/real_run.md", "docs/real_run_zh.md"])
def test_the_tables_have_the_numbers_of_the_rows(page):
    rows = {row["name"]: set(numbers_in(row)) for row in json.loads(real_run.RESULTS.read_text(encoding="utf-8"))}
    told = set()
    for line in (REPO_ROOT / page).read_text(encoding="utf-8").splitlines():
        name = re.match(r"\| `([^`]+)`", line)
        if name is None or name[1] not in rows:
            continue
        for number in map(float, re.findall(r"\d\.\d{3}\b", line)):
            told.add((name[1], number))
            assert any(abs(value - number) <= 5.001e-4 for value in rows[name[1]]), (name[1], number)
    assert rows.keys() == {name for name, _ in told}
    assert len(told) > 100


@pytest.mark.skipif(sys.platform == "win32", reason="no shell and no SIGTERM")
def test_a_try_that_is_ended_ends_its_training(tmp_path, monkeypatch):
    program = tmp_path / "python"
    ending = f"'echo ended > {tmp_path}/told; exit'"
    program.write_text(f"#!/bin/sh\ntrap {ending} TERM\nkill -TERM {os.getpid()}\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(SystemExit):
        real_run.train_for([], tmp_path / "run", 1, tmp_path / "clock")
    assert (tmp_path / "told").read_text() == "ended\n"
    assert (tmp_path / "clock").is_file()


def test_a_failing_training_is_an_error(command):
    with pytest.raises(UserError, match="train.py ended with status 1"):
        command("first", "llm.path=nowhere")
