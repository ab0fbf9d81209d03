"""Fixtures that more than one test file uses."""

import functools
import gc
import pkgutil
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from exporting import stock_check
from paths import REPO_ROOT
from tests.raw_world import World
from tests.tiny import run_config, tiny_config, write_qwen, write_qwen1, write_records, write_siglip
from training.loop import Trainer

# a background job of a shell, or nohup, starts with these ignored, and so would every program that a test starts
for number, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, number) and signal.getsignal(signal.Signals[number]) == signal.SIG_IGN:
        signal.signal(signal.Signals[number], handler)

torch.set_num_threads(1)  # models of a few thousand weights only lose time in handing work to threads

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections; each would look through it for 0.25 s."""
    gc.collect()
    gc.freeze()


def forget_accelerator() -> None:
    """accelerate allows one precision per process; its own tests forget it the same way."""
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    forget_accelerator()


# what a finished run makes for its readers takes longer than the training of a tiny model, in each of hundreds of runs
REPORTS = {
    "training.samples.MAX_NEW_TOKENS": 1,
    "training.run_log.draw_curves": lambda *_: b"",
    "training.provenance.code_commit": lambda: "0" * 40,
}


@pytest.fixture(scope="session", autouse=True)
def short_reports():
    """Let the answers in `samples.html` end after a token, draw no `loss.png` and do not ask git for the commit."""
    with pytest.MonkeyPatch.context() as patch:
        whole = {name: pkgutil.resolve_name(name) for name in REPORTS}
        for name, short in REPORTS.items():
            patch.setattr(name, short)
        yield whole


@pytest.fixture(scope="module")
def whole_reports(short_reports):
    """Whole reports in a file of tests that read them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, whole in short_reports.items():
            patch.setattr(name, whole)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder with tiny backbones and records."""
    folder = tmp_path_factory.mktemp("workshop")
    write_siglip(folder / "siglip")
    write_qwen(folder / "qwen")
    write_records(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder of random tiny backbones; they lie beside the run: `model_root=` its grandparent's parent."""
    folder = tmp_path_factory.mktemp("tiny")
    write_siglip(folder / "siglip")
    write_qwen(folder / "qwen")
    write_records(folder)
    return Trainer(tiny_config(folder, data={"val_fraction": 0.4}, train={"max_steps": 2})).run()


@pytest.fixture(scope="session")
def samples_folder() -> Path:
    """Real COCO photos with annotations in both source formats; they are not part of the repository."""
    folder = Path(REPO_ROOT).parent / "shared" / "samples"
    if not folder.is_dir():
        pytest.skip(f"no real-photo samples at {folder}")
    return folder


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    """A folder with tiny backbones of all language-model generations."""
    folder = tmp_path_factory.mktemp("backbones")
    write_siglip(folder / "siglip")
    write_qwen(folder / "qwen")
    for kind in ("qwen2", "qwen3", "llama"):
        for tied in (True, False):
            write_qwen(folder / f"{kind}-{'tied' if tied else 'untied'}", kind, tied)
    write_qwen1(folder / "qwen1")
    write_qwen1(folder / "qwen1-short", seq_length=48)  # dialogues cross this, so positions change on the way
    write_records(folder)
    return folder


@pytest.fixture
def folder(backbones, tmp_path) -> Path:
    """A tiny Qwen2 that the test may change."""
    return shutil.copytree(backbones / "qwen", tmp_path / "qwen")


@pytest.fixture
def configure(workshop, tmp_path):
    """`configure(max_steps=…, data={…})`: a config whose `train` section takes the plain keywords."""
    return functools.partial(run_config, workshop, output_dir=str(tmp_path / "run"))


@pytest.fixture
def same_process(monkeypatch):
    compare_here(monkeypatch)


def compare_here(patch: pytest.MonkeyPatch) -> None:
    """Compare an export in this process, because starting another takes seconds."""

    def run(command, **_):
        patch.setattr(sys, "argv", command[2:])
        try:
            stock_check.main()
        except Exception:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, "", "")

    patch.setattr(subprocess, "run", run)
