"""Failures injected into training: no checkpoint is ever worth less than before, and none is of half a step."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from errors import UserError
from model.checkpoint_folder import damage, list_checkpoints
from paths import REPO_ROOT
from tests.training.runs import at_step, losses, names, same, weights
from training import loop, provenance, state
from training.checks import NonFiniteError
from training.loop import Trainer
from training.signals import SIGNALS

COMMIT = "training.provenance.code_commit"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_changes_and_deletes_nothing(config, what, tmp_path):
    trainer = Trainer(config(save_total_limit=1, save_steps=2, micro_batch=1))
    forward = trainer.forward

    def poisoned(batch, count):
        loss = forward(batch, count)
        if trainer.progress.step < 2:
            return loss
        if what == "loss":
            return loss * float("nan")
        # a finite loss with an infinite gradient: the square root at zero
        return loss + 0 * loss.detach() + (trainer.model.feature_proj[0].weight * 0).sum().abs().sqrt()

    trainer.forward = poisoned
    with pytest.raises(NonFiniteError, match=rf"the {what} became (nan|inf) at step 3; nothing of it.*photos/.*\.png"):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    expected = weights(tmp_path / "run" / "checkpoint-2")
    own = dict(trainer.model.feature_proj.named_parameters())
    assert all(torch.equal(own[name].detach(), expected[name]) for name in own)


def test_the_sample_with_the_bad_loss_is_named(config):
    trainer = Trainer(config(micro_batch=1, accumulation=3))
    bad = []
    forward = trainer.forward

    def poisoned(batch, count):
        loss = forward(batch, count)
        if len(bad) or batch.crop_index is None:
            return loss
        bad.append(batch)
        return loss * float("inf")

    trainer.forward = poisoned
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    assert str(caught.value).count("photos/") + str(caught.value).count("no photo") == 1


def test_resuming_an_older_checkpoint_keeps_old_and_new(config, whole):
    config_ = config("whole", save_total_limit=1, max_steps=6)
    Trainer(config_, resume=str(whole / "checkpoint-2")).run()
    # 1 and 2 were pruned once newer ones had been written; what was beyond step 2 is kept under another name
    assert names(whole) == ["checkpoint-3.superseded", "checkpoint-4.superseded", "checkpoint-6"]
    assert Trainer(config_, resume="auto").progress.step == 6


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    for number, age in ((9, 0), (3, 30), (5, 20), (4, 10)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        os.utime(folder / "config.yaml", (1000 - age, 1000 - age))
    state.prune(tmp_path, keep=2, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-9"]  # 9 was written last, whatever its number
    state.prune(tmp_path, keep=1, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_after_a_whole_step(config, whole, number, tmp_path):
    trainer = Trainer(config(save_steps=100, workers=1))
    at_step(trainer, 2, lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert same(tmp_path / "run" / "checkpoint-2", whole / "checkpoint-2")
    Trainer(config(), resume="auto").run()
    assert same(tmp_path / "run" / "checkpoint-4", whole / "checkpoint-4")
    assert losses(tmp_path / "run") == losses(whole)


def lines_of(function):
    first = function.__code__.co_firstlineno
    return sorted({line for _, _, line in function.__code__.co_lines() if line is not None and line > first})


def at_line(monkeypatch, trainer, line, action):
    """Call `action` before `line` of `optimizer_step` runs in step 2."""
    inner = loop.optimizer_step

    def tracer(frame, event, argument):
        if frame.f_code is not inner.__code__:
            return None

        def local(frame, event, argument):
            if event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                frame.f_trace = None
                action()
                return None
            return local

        return local

    def traced(run, *arguments):
        if run.progress.step != 1:
            return inner(run, *arguments)
        sys.settrace(tracer)
        try:
            return inner(run, *arguments)
        finally:
            sys.settrace(None)

    monkeypatch.setattr("training.loop.optimizer_step", traced)


@pytest.mark.parametrize("line", lines_of(loop.optimizer_step))
def test_interrupted_or_failing_at_any_line_leaves_whole_steps(config, whole, line, tmp_path, monkeypatch):
    at_line(monkeypatch, None, line, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        Trainer(config("signal", save_steps=100)).run()
    (saved,) = list_checkpoints(tmp_path / "signal")
    assert same(saved, whole / saved.name)
    assert not damage(saved)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.undo()
    at_line(monkeypatch, None, line, fail)
    with pytest.raises(UserError, match="out of memory"):
        Trainer(config("failure", save_steps=100)).run()
    for saved in list_checkpoints(tmp_path / "failure"):
        assert same(saved, whole / saved.name)
        monkeypatch.undo()
        Trainer(config("failure"), resume="auto").run()
        assert same(tmp_path / "failure" / "checkpoint-4", whole / "checkpoint-4")


def test_failing_while_weights_change_saves_nothing(config, monkeypatch, tmp_path):
    trainer = Trainer(config(save_steps=100))

    def half(*_):
        with torch.no_grad():
            trainer.model.feature_proj[0].weight.add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.optimizer.optimizer, "step", half)
    with pytest.raises(UserError, match="out of memory at step 1"):
        trainer.run()
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("fails_at", range(7))
def test_a_full_disk_is_one_sentence_and_leaves_no_remains(config, fails_at, tmp_path, monkeypatch):
    trainer = Trainer(config(max_steps=3))
    write = Path.write_bytes
    calls = []

    def write_bytes(path, content):
        if trainer.progress.step == 2 and ".tmp" in str(path.parent):
            calls.append(path)
            if len(calls) == fails_at + 1:
                write(path, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    if fails_at == 6:  # peft writes the adapter's settings by itself

        def full(settings, folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(peft.LoraConfig, "save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            trainer.run()
        assert names(tmp_path / "run") == []
        return
    with pytest.raises(
        UserError, match=r"the checkpoint .*checkpoint-2 could not be written \(No space left on"
    ) as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "run") == ["checkpoint-1"]
    assert not damage(tmp_path / "run" / "checkpoint-1")


FILE_SIZE = """
import resource, signal, sys
from cli import run_script
from config import Config
from training.loop import Trainer
def main():
    trainer = Trainer(Config.model_validate_json(open(sys.argv[1]).read()))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))
    trainer.run()
run_script(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_the_system_refuses_to_write(config, tmp_path):
    """The operating system itself refuses what peft, torch and safetensors write."""
    (tmp_path / "script.py").write_text(FILE_SIZE)
    (tmp_path / "config.json").write_text(config(trackers=[]).model_dump_json())
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json")],
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "could not be written" in result.stderr.splitlines()[-1]
    assert names(tmp_path / "run") == []


def test_a_vanished_output_folder_is_one_sentence(config, tmp_path):
    trainer = Trainer(config(trackers=[], log_steps=100, save_steps=3))
    at_step(trainer, 3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match=r"could not be written \(No such file or directory\)"):
        trainer.run()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_follow_the_umask(config, tmp_path):
    before = os.umask(0o027)
    try:
        folder = Trainer(config(max_steps=1)).run()
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()} == {0o640}


def test_without_git_there_is_no_commit(short_reports, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert short_reports[COMMIT]() is None


def test_the_repository_around_us_is_not_ours(short_reports, monkeypatch, tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "REPO_ROOT", tmp_path / "copy")
    assert short_reports[COMMIT]() is None


def test_dry_run_of_a_folder_that_was_trained_in(config, whole):
    run = Trainer(config("whole"), dry_run=True)
    assert run.progress.step == 0
    assert names(whole) == [f"checkpoint-{number}" for number in range(1, 5)]


def test_a_run_without_the_newest_keys_of_the_prompt_is_the_same_run(configure, tmp_path):
    fingerprints = dict.fromkeys(("visual", "llm", "prompt", "transform"), "")
    shape = state.run_shape(configure(), "hash")
    older = {key: value for key, value in shape["prompt"].items() if key != "newline_before_text"}
    content = {"fingerprints": fingerprints, "shape": shape | {"prompt": older}}
    (tmp_path / "provenance.json").write_text(json.dumps(content))
    assert state.accepted_changes(tmp_path, shape, accept=False) == []
    changed = shape | {"prompt": shape["prompt"] | {"newline_before_text": True}}
    with pytest.raises(UserError, match="'newline_before_text': False.*'newline_before_text': True"):
        state.accepted_changes(tmp_path, changed, accept=False)
