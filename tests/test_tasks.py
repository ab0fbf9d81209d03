"""The project's commands: what they keep of earlier runs, and what they say about the machine."""

import json
import shutil

import pytest

import tasks


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "checkpoints" / "demo"
    (folder / "checkpoint-240").mkdir(parents=True)
    (folder / "checkpoint-240" / "weights").write_text("trained")
    return folder


def names(run):
    return sorted(path.name for path in run.parent.iterdir())


def test_the_demo_removes_only_what_it_left_itself(run):
    (run / tasks.DEMO_STAMP).write_text(tasks._contents(run))
    tasks.clear_demo_run(run)
    assert names(run) == []
    tasks.clear_demo_run(run)  # nothing there


@pytest.mark.parametrize("change", ["no stamp", "longer run", "other weights"])
def test_another_run_is_moved_aside(run, capsys, change):
    if change != "no stamp":
        (run / tasks.DEMO_STAMP).write_text(tasks._contents(run))
    if change == "longer run":
        (run / "checkpoint-9000").mkdir()
        (run / "checkpoint-9000" / "weights").write_text("trained for long")
    elif change == "other weights":
        (run / "checkpoint-240" / "weights").write_text("trained otherwise")
    (run.parent / "demo.old-1").mkdir()
    tasks.clear_demo_run(run)
    assert names(run) == ["demo.old-1", "demo.old-2"]
    assert (run.parent / "demo.old-2" / "checkpoint-240" / "weights").is_file()
    assert "demo.old-2" in capsys.readouterr().out


def test_the_page_shows_the_newest_checkpoint_else_the_shipped_one(run, monkeypatch):
    monkeypatch.setattr(tasks, "ROOT", run.parents[1])
    (run / "checkpoint-80").mkdir()
    assert tasks.newest_checkpoint() == run / "checkpoint-240"
    shutil.rmtree(run)
    assert tasks.newest_checkpoint() == run.parents[1] / tasks.SHIPPED


@pytest.mark.parametrize(("smi", "cuda", "told"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_gpu_without_cuda_is_told(tmp_path, monkeypatch, capsys, smi, cuda, told):
    (tmp_path / ".venv").mkdir()
    (tmp_path / "requirements.txt").write_text("torch==9.9.9\n")
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(tasks, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(tasks, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    installed = []
    monkeypatch.setattr(tasks, "_install", lambda requirements, torch: installed.append((requirements, torch)))
    monkeypatch.setattr(tasks, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if smi else None)
    tasks.install("requirements.txt")
    tasks.install("requirements.txt")
    assert installed == [("requirements.txt", "torch==9.9.9")]  # once
    output = capsys.readouterr().out
    assert ("pytorch.org" in output) == told
    assert ("torch==9.9.9 with CUDA" in output) == told


@pytest.mark.parametrize("low", [None, "count_zh", "unknown", "dialogue"])
def test_every_type_of_the_demo_must_reach_its_score(tmp_path, low):
    kinds = ["count", "count_zh", "description", "dialogue", "unknown", "unknown_zh"]
    by_type = {kind: {"accuracy": 0.7 if kind in (low, "description") else 0.98} for kind in kinds}
    passes = {
        "trained": {"by_type": by_type, "overall": {"accuracy": 0.95}},
        "blind": {"overall": {"accuracy": 0.3}},
    }
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"passes": passes}))
    if low is None:
        tasks.check_scores(file)
    else:
        with pytest.raises(SystemExit, match=low):
            tasks.check_scores(file)
