"""The fuzzer: a slice of each target finds nothing, and every kind of failure is counted where there is one."""

import importlib
import json
import random
import sys
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import fuzz, fuzz_files, fuzz_text
from benchmarks.fuzz import FAILURES, TARGETS, Target, run_case, run_target

# a case that does something else for each number; workers import it by its name
BROKEN = """
import os, time
from benchmarks.fuzz_files import FoundError
from errors import UserError

def refused(): raise UserError("sentence")
def traceback(): return 1 / 0
def escaped(): raise FoundError("escaped", "../x")
def long(): raise UserError("x" * 9999)
def hang(): time.sleep(600)
def crash(): os._exit(3)
def fine(): return "fine"

DOES = [refused, traceback, escaped, long, hang, crash, fine]

def case(draw, folder):
    return draw.choice(DOES)()

def traceback_case(draw, folder):
    return traceback()
"""


@pytest.fixture
def broken_product(tmp_path, monkeypatch):
    (tmp_path / "broken_product.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("broken_product")
    del sys.modules["broken_product"]


SLICES = {"annotations": 150, "photos": 80, "configs": 60, "injections": 40}


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_sound(name):
    """What `python -m benchmarks.fuzz` does at length; in this process."""
    for number in range(SLICES[name]):
        kind, details = run_case(TARGETS[name].case, name, 0, number)
        assert kind not in FAILURES, f"--target {name} --case {number}: {kind}: {details}"


def test_every_failure_is_counted_and_the_rest_goes_on(broken_product):
    names = {
        "traceback": "traceback",
        "escaped": "escaped",
        "long": "unclear message",
        "hang": "hang",
        "crash": "crash",
    }
    words = [random.Random(f"0/broken/{number}").choice(broken_product.DOES).__name__ for number in range(24)]
    expected = Counter(names.get(word, word) for word in words)
    assert len(expected) == 7
    result = run_target("broken", Target(broken_product.case, 24, 1.0), seed=0, count=24, processes=2)
    assert result["cases"] == 24
    assert result["outcomes"] == {word: expected[word] for word in ("refused", "fine")}
    assert result["failures"] == {kind: expected[kind] for kind in FAILURES}
    for example in result["examples"]:
        assert names[words[example["case"]]] == example["kind"]
    [example] = [example for example in result["examples"] if example["kind"] == "traceback"][:1]
    assert example["details"] == "ZeroDivisionError: division by zero (broken_product.py:7)"


def test_rows_that_are_lost_are_seen(monkeypatch):
    sound = fuzz_files.process_sources

    def loses_a_row(data):
        image_map, captions, reports = sound(data)[:3]
        reports[0].kept -= 1
        return image_map, captions, reports

    monkeypatch.setattr(fuzz_files, "process_sources", loses_a_row)
    assert "unaccounted" in {run_case(fuzz_files.annotations, "annotations", 0, number)[0] for number in range(20)}


def test_a_path_outside_is_seen(monkeypatch):
    sound = fuzz_files.process_sources

    def leaves(data):
        image_map, captions, reports = sound(data)[:3]
        return (
            {key: photo | {"path": photo["path"] + "/../../../x"} for key, photo in image_map.items()},
            captions,
            reports,
        )

    monkeypatch.setattr(fuzz_files, "process_sources", leaves)
    assert "escaped" in {run_case(fuzz_files.annotations, "annotations", 0, number)[0] for number in range(20)}


def test_files_that_cannot_be_read_back_are_seen(monkeypatch):
    monkeypatch.setattr(
        fuzz_files, "write_records", lambda image_map, captions, *paths: [p.write_text("{") for p in paths]
    )
    assert "unaccounted" in {run_case(fuzz_files.annotations, "annotations", 0, number)[0] for number in range(20)}


def test_a_photo_that_no_entry_shows_is_seen(monkeypatch):
    sound = fuzz_files.read_records

    def forgets_later_turns(*paths):
        known, entries = sound(*paths)
        return known, [replace(entry, turns=entry.turns[:1]) for entry in entries]

    monkeypatch.setattr(fuzz_files, "read_records", forgets_later_turns)
    outcomes = [run_case(fuzz_files.annotations, "annotations", 0, number) for number in range(60)]
    assert any("no entry shows the photos" in details for kind, details in outcomes if kind == "unaccounted")


def test_a_control_token_out_of_text_is_seen(monkeypatch):
    monkeypatch.setattr("qwen.chat.text_encoder", lambda tokenizer: tokenizer.backend_tokenizer)
    kinds = {run_case(fuzz_text.injections, "injections", 0, number)[0] for number in range(20)}
    assert "control token" in kinds


def test_an_accepted_config_that_cannot_work_is_seen(monkeypatch):
    monkeypatch.setattr(fuzz_text, "load_config", lambda *_: _with_temperature(1e-320))
    assert run_case(fuzz_text.configs, "configs", 0, 0)[0] == "traceback"


def _with_temperature(temperature):
    from config import Generate, parse_config

    config = parse_config({"visual": {"path": "v"}, "llm": {"path": "l"}}, "test")
    config.generate = Generate.model_construct(**Generate().model_dump() | {"temperature": temperature})
    return config


def test_command_writes_json_and_fails(broken_product, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "TARGETS", {"photos": Target(broken_product.traceback_case, 2, 5.0)})
    with pytest.raises(SystemExit, match="1"):
        fuzz.main(["--target", "photos", "--output", str(tmp_path / "f.json")])
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["failures"]["traceback"] == 2
    assert "--target photos --case 0: traceback: ZeroDivisionError" in capsys.readouterr().out
