"""Runs at their edges: signals to a whole process group, failures outside of a step, unusual sets."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
from tqdm import tqdm

from errors import UserError
from model.checkpoint_folder import list_checkpoints
from paths import REPO_ROOT
from tests.training.runs import at_step, lines, names, same
from training import samples
from training.loop import Trainer
from training.signals import SIGNALS, StopSignals, outlast_signals
from training.stages import stages

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


# Signals


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_whole_process_group_ends_no_worker(config, tmp_path, number):
    others = multiprocessing.active_children()
    trainer = Trainer(config(save_steps=100, workers=2))

    def send():
        workers = [process for process in multiprocessing.active_children() if process not in others]
        for worker in workers:
            os.kill(worker.pid, number)
        workers[0].join(0.3)  # torch would raise the end of a worker here
        signal.raise_signal(number)

    at_step(trainer, 2, send)
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert caught.value.code == 128 + number
    assert names(tmp_path / "run") == ["checkpoint-2"]


def wait_for_signals(running, ready):
    outlast_signals(running, 0)
    ready.set()
    while True:
        signal.pause()


@posix
def test_a_worker_obeys_when_the_run_is_over():
    context, stop = multiprocessing.get_context("fork"), StopSignals()
    ready = context.Event()
    with stop:
        worker = context.Process(target=wait_for_signals, args=(stop.running, ready))
        worker.start()
        ready.wait()
        worker.terminate()
        worker.join(0.3)
        assert worker.is_alive()
    while worker.is_alive():  # a signal may come between two pauses
        worker.terminate()
        worker.join(0.1)
    assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_an_ignored_signal_stays_ignored(config, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        trainer = Trainer(config())
        at_step(trainer, 2, lambda: signal.raise_signal(signal.SIGHUP))
        assert trainer.run().name == "checkpoint-4"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_takes_no_sentence_and_that_is_no_error(config, tmp_path, monkeypatch):
    trainer = Trainer(config(save_steps=100))

    def hang_up():
        def write(*_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(tqdm, "write", write)
        signal.raise_signal(signal.SIGTERM)

    at_step(trainer, 2, hang_up)
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert caught.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "run") == ["checkpoint-2"]


@pytest.mark.parametrize("when", ["learning", "saving"])
def test_a_second_signal_ends_at_once_without_harm(config, tmp_path, monkeypatch, when):
    whole = Trainer(config("whole")).run()
    trainer = Trainer(config(save_steps=2))

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    if when == "learning":
        at_step(trainer, 4, twice)
    else:
        at_step(trainer, 4, lambda: monkeypatch.setattr("model.checkpoint.flush", twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    monkeypatch.undo()
    assert same(Trainer(config(), resume="auto").run(), whole)


# Failures outside of a step


class Loader:
    """A photo loader that calls `action` for one photo, also in a worker process."""

    def __init__(self, inner, ID, action):
        self.inner, self.ID, self.action = inner, ID, action

    def __call__(self, photo, epoch):
        if photo.ID == self.ID:
            self.action()
        return self.inner(photo, epoch)


def defect():
    raise KeyError("a mistake of ours")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


WORKER_FAULT = """
import sys
from cli import run_script
from config import Config
from tests.training.test_loop_edges import Loader, defect, killed
from training.loop import Trainer
def main():
    trainer = Trainer(Config.model_validate_json(open(sys.argv[1]).read()))
    fault = {"defect": defect, "killed": killed}[sys.argv[2]]
    trainer.train_set.load_photo = Loader(trainer.train_set.load_photo, 3, fault)
    trainer.run()
run_script(main)
"""


def run_with_fault(config, tmp_path, fault):
    """A run in a program of its own: torch raises the end of a worker wherever the main thread is at that moment."""
    (tmp_path / "script.py").write_text(WORKER_FAULT)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    return subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json"), fault],
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@posix
def test_a_worker_that_the_system_kills_is_a_sentence(config, tmp_path):
    whole = Trainer(config("whole", micro_batch=1, max_steps=9)).run().parent
    result = run_with_fault(config(micro_batch=1, max_steps=9, save_steps=100, workers=1), tmp_path, "killed")
    assert result.returncode == 1
    assert re.search(r"error: the system ended a process that reads photos at step \d.*train.workers", result.stderr)
    for saved in list_checkpoints(tmp_path / "run"):
        assert same(saved, whole / saved.name)


def test_a_reading_process_that_ends_before_the_first_step_is_a_sentence_too(config, monkeypatch):
    def build(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("training.stages.Trainer", build)
    with pytest.raises(UserError, match="the system ended a process that reads photos"):
        next(stages(config()))


def test_a_defect_in_a_worker_keeps_its_traceback_and_the_program_ends(config, tmp_path):
    result = run_with_fault(config(micro_batch=1, max_steps=50, workers=2), tmp_path, "defect")
    assert result.returncode == 1
    assert "in defect" in result.stderr
    assert "KeyError: 'a mistake of ours'" in result.stderr


def test_a_lack_of_main_memory_is_a_sentence_after_a_checkpoint(config, tmp_path):
    trainer = Trainer(config(save_steps=100))

    def fail():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    at_step(trainer, 3, fail)
    with pytest.raises(UserError, match="out of memory at step 3: lower train.micro_batch"):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_a_bad_photo_of_the_validation_set_ends_the_run_with_a_checkpoint(config, tmp_path):
    trainer = Trainer(config(save_steps=100, eval_steps=2, data={"val_fraction": 0.4}))

    def refuse():
        raise UserError("photo 1.png: damaged")

    (ID, *_) = next(entry.images for entry in trainer.val_set.entries if entry.images)
    trainer.val_set.load_photo = Loader(trainer.val_set.load_photo, ID, refuse)
    with pytest.raises(UserError, match=r"photo 1.png: damaged"):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert Trainer(config(data={"val_fraction": 0.4}), resume="auto").run().name == "checkpoint-4"


def test_a_defect_in_validation_keeps_its_traceback(config, tmp_path):
    trainer = Trainer(config(save_steps=1, eval_steps=2, data={"val_fraction": 0.4}))
    trainer.val_set.load_photo = Loader(trainer.val_set.load_photo, None, defect)
    (ID, *_) = next(entry.images for entry in trainer.val_set.entries if entry.images)
    trainer.val_set.load_photo.ID = ID
    with pytest.raises(KeyError):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-1"]


def test_a_mistake_in_the_page_of_samples_stops_no_run(config, monkeypatch, caplog):
    monkeypatch.setattr(samples, "render_page", lambda *_: defect())
    assert Trainer(config(eval_steps=1)).run().name == "checkpoint-4"
    (record,) = [record for record in caplog.records if "samples.html" in record.message]
    assert record.exc_info[0] is KeyError


def test_a_log_that_takes_no_line_ends_the_run_with_a_checkpoint(config, tmp_path, monkeypatch):
    trainer = Trainer(config(save_steps=100))

    def refuse(*_):
        raise UserError("metrics.jsonl: No space left on device")

    at_step(trainer, 3, lambda: monkeypatch.setattr("training.run_log.RunLog.write", refuse))
    with pytest.raises(UserError, match="No space left"):
        trainer.run()
    assert names(tmp_path / "run") == ["checkpoint-3"]


# Unusual sets


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_steps": 1, "eval_samples": 1, "workers": 2},
        {"eval_steps": 1, "tokens_per_batch": 300},
        {"eval_steps": None},
        {"eval_steps": 1, "data": {"val_fraction": 0.0}},
    ],
)
def test_validation_of_little_or_nothing(config, tmp_path, settings):
    settings = {"data": {"val_fraction": 0.4}} | settings
    Trainer(config(**settings)).run()
    seen = ["val_loss" in line for line in lines(tmp_path / "run")]
    expected = settings["data"]["val_fraction"] > 0
    assert seen == [expected and settings["eval_steps"] is not None] * 3 + [expected]


@pytest.mark.parametrize("cache", [False, True])
def test_text_alone_trains_and_validates(config, tmp_path, cache):
    entries = [{"source": "tiny", "q": f"Say {number}.", "a": [str(number)]} for number in range(9)]
    (tmp_path / "captions.json").write_text(json.dumps({"text": entries}))
    (tmp_path / "image_map.json").write_text("{}")
    files = {name: str(tmp_path / f"{name}.json") for name in ("captions", "image_map")}
    data = files | {"val_fraction": 0.3, "cache_features": cache, "feature_cache": str(tmp_path / "features")}
    trainer = Trainer(config(data=data, eval_steps=2))
    folder = trainer.run()
    assert "val_loss" in lines(folder.parent)[1]


def test_a_validation_loss_that_is_no_number_is_said(config, monkeypatch, capsys):
    monkeypatch.setattr("training.due.validate", lambda run: {"val_loss": float("nan")})
    Trainer(config(max_steps=1, data={"val_fraction": 0.4})).run()
    assert "the validation loss at step 1 is nan" in capsys.readouterr().out
