"""Killed training equals training that was left alone; `python -m benchmarks.kill` does the same fifty times."""

import json
import shutil
import sys

import pytest

from benchmarks.kill import difference, run
from training.loop import Trainer


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups and no SIGKILL")
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.nightly)])  # 25 seconds a kill
def test_kills_change_nothing(kills):
    result = run(kills, seed=1)
    assert result["problems"] == []
    assert result["kills"] == kills
    assert result["moments"]["while a checkpoint was written"]


def test_a_difference_is_found(workshop, tmp_path, monkeypatch):
    from tests.tiny import tiny_config

    monkeypatch.setattr("benchmarks.kill.STEPS", 2)
    settings = {"max_steps": 2, "log_steps": 1, "output_dir": str(tmp_path / "one"), "trackers": []}
    Trainer(tiny_config(workshop, train=settings)).run()
    other = shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert difference(other, tmp_path / "one") == []
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 1e-9
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other / "checkpoint-2.tmp").mkdir()
    assert difference(other, tmp_path / "one") == ["metrics.jsonl", "left behind: checkpoint-2.tmp"]
    projector = other / "checkpoint-2" / "feature_proj.safetensors"
    content = bytearray(projector.read_bytes())
    content[-2] ^= 1
    projector.write_bytes(content)
    found = difference(other, tmp_path / "one")
    assert any("feature_proj.safetensors: " in problem for problem in found)
    assert any("its checksum differs" in problem for problem in found)
