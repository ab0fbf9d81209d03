"""The log of a run survives crashes, and trackers that fail; its curves can be drawn from any of its states."""

import io
import json
import logging
import sys
import types

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Train, parse_config
from errors import UserError
from training import curves, run_log
from training.curves import draw_curves, smoothed, ticks
from training.run_log import RunLog, check_trackers, write_whole

pytestmark = pytest.mark.usefixtures("whole_reports")


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, steps, resumed_step=0, **settings):
    log = RunLog(folder, resumed_step, **settings)
    for step in steps:
        log.write(step, {"loss": 1 / step, "lora_lr": 1e-4})
    log.close()


class FakeRun:
    def __init__(self, module):
        self.module = module

    def log(self, values, step=None):
        self.module.logged.append((step, values))
        if self.module.broken:
            raise ConnectionError("no route to host")

    def finish(self):
        self.module.finished += 1
        if self.module.broken:
            raise ConnectionError("no route to host")


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for the package, used through accelerate's own tracker; `broken`: everything after the start fails."""
    module = types.ModuleType("wandb")
    module.started, module.logged, module.finished, module.broken = [], [], 0, False

    def init(**settings):
        module.started.append(settings)
        return FakeRun(module)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_log_has_every_step_once(tmp_path):
    write_steps(tmp_path, [1, 10, 20, 30])
    write_steps(tmp_path, [30, 40], resumed_step=20)
    assert steps_of(tmp_path) == [1, 10, 20, 30, 40]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 10, 20, 30, 40]
    assert board.Scalars("loss")[3].value == pytest.approx(1 / 30)


def test_a_new_run_begins_a_new_log(tmp_path):
    write_steps(tmp_path, [1, 10])
    write_steps(tmp_path, [1, 5])
    assert steps_of(tmp_path) == [1, 5]


def test_a_last_line_cut_by_a_crash_is_left_out_quietly(tmp_path, caplog):
    write_steps(tmp_path, [1, 10])
    with open(tmp_path / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"step":20,"lo')
    write_steps(tmp_path, [20], resumed_step=10)
    assert steps_of(tmp_path) == [1, 10, 20]
    assert caplog.messages == []


@pytest.mark.parametrize("broken", [b"\0\0", b'{"step":5,"lo', b"[1]", b'{"loss":3}', b'{"step":null}', b"\xff\xfe"])
def test_a_broken_line_is_named_and_does_not_stop_a_resumption(tmp_path, caplog, broken):
    write_steps(tmp_path, [1, 10, 20])
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], broken, *lines[1:]]) + b"\n")
    write_steps(tmp_path, [30], resumed_step=20)
    assert steps_of(tmp_path) == [1, 10, 20, 30]
    [warning] = caplog.messages
    assert warning == f"{tmp_path / 'metrics.jsonl'}: line 2 could not be read and was left out"


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    log = RunLog(tmp_path, 0, trackers=[])
    log.write(1, {"loss": 2.0, "mfu": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"loss":2.0,"mfu":null}\n'
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_that_cannot_be_written_names_the_file(tmp_path):
    log = RunLog(tmp_path, 0, trackers=[])
    log.file.unlink()
    log.file.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: Is a directory|metrics\.jsonl: Permission denied"):
        log.write(1, {"loss": 2.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*'train\.output_dir'"):
        RunLog(tmp_path / "file", 0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_trackers_get_numbers_settings_and_a_name(tmp_path, fake_wandb):
    folder = tmp_path / "运行"
    log = RunLog(folder, 300, ["wandb", "tensorboard", "wandb"], {"train": {"epochs": 1}})
    log.write(310, {"loss": 2.0, "val_loss/中文": 1.0, "note": "text", "mfu": float("inf")})
    log.close()
    log.close()
    [started] = fake_wandb.started
    assert started["name"] == "运行 from step 300"
    assert started["config"] == {"train": {"epochs": 1}}
    assert started["dir"] == str(folder)
    assert fake_wandb.logged == [(310, {"loss": 2.0, "val_loss/中文": 1.0})]
    assert fake_wandb.finished == 1


def test_a_failing_tracker_is_warned_of_once_and_stops_nothing(tmp_path, fake_wandb, caplog):
    fake_wandb.broken = True
    write_steps(tmp_path, [1, 2, 3], trackers=["wandb", "tensorboard"])
    assert steps_of(tmp_path) == [1, 2, 3]
    assert len(fake_wandb.logged) == 3  # the network may come back
    [warning] = caplog.messages
    assert "wandb failed (ConnectionError: no route to host); training continues" in warning
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_does_not_start_is_left_out(tmp_path, fake_wandb, caplog):
    def init(**_):
        raise RuntimeError("No API key configured")

    fake_wandb.init = init
    write_steps(tmp_path, [1, 2], trackers=["wandb"])
    assert steps_of(tmp_path) == [1, 2]
    [warning] = caplog.messages
    assert "No API key" in warning


def test_swanlab_goes_through_its_tracker(tmp_path, monkeypatch):
    module = types.ModuleType("swanlab")
    started, logged = [], []
    module.config = {}
    module.init = lambda **settings: (
        started.append(settings)
        or types.SimpleNamespace(log=lambda values, step=None: logged.append((step, values)), finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "swanlab", module)
    write_steps(tmp_path, [1], trackers=["swanlab"])
    assert started[0]["experiment_name"] == tmp_path.name
    assert [step for step, _ in logged] == [1]


@pytest.mark.parametrize("folder", [False, True])
def test_trackers_that_are_unknown_or_not_installed_are_named_at_the_start(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    if folder:
        (tmp_path / "swanlab").mkdir()
    check_trackers(Train())
    with pytest.raises(UserError, match=r"pip install swanlab, or set train\.trackers=\[tensorboard\]"):
        check_trackers(Train(trackers=["tensorboard", "swanlab"]))
    raw = {"visual": {"path": "v"}, "llm": {"path": "l"}, "train": {"trackers": ["wandbb"]}}
    with pytest.raises(UserError, match=r"'train\.trackers\.0' = 'wandbb'.*'tensorboard', 'wandb' or 'swanlab'"):
        parse_config(raw, "my.yaml")


def drawn(png):
    """The names of the curves whose colour, give or take what scaling down does to it, is in the picture."""
    colours = [colour for _, colour in Image.open(io.BytesIO(png)).getcolors(1 << 20)]
    return {
        name
        for name, code in curves._COLOURS.items()
        if any(max(abs(a - b) for a, b in zip(colour, bytes.fromhex(code[1:]), strict=True)) < 12 for colour in colours)
    }


PARTS = ("projector", "lora", "llm", "vision", "vision_lora", "toy")


def test_curves_show_what_the_log_has():
    rates = dict(zip(PARTS, (1e-3, 1e-4, 2e-5, 3e-5, 4e-5, 5e-5), strict=True))
    entries = [
        {"step": step, "loss": 3 / step if step != 40 else None} | {f"{part}_lr": rate for part, rate in rates.items()}
        for step in range(1, 90)
    ]
    assert drawn(draw_curves(entries, "run")) == set(curves._COLOURS) - {"validation loss"}
    entries[49]["val_loss"] = 2.0
    assert drawn(draw_curves(entries, "运行 第一次")) == set(curves._COLOURS)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": 0.0, "projector_lr": 0.0}],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 100_000, "loss": 2.0, "val_loss": 1e9}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": "x"}],
    ],
)
def test_curves_of_odd_logs(entries):
    assert Image.open(io.BytesIO(draw_curves(entries, "<run> 第"))).size == (1000, 680)


def test_curves_without_a_chinese_font(monkeypatch):
    from evaluation import report

    monkeypatch.setattr(report, "_CJK_FONTS", {})
    assert Image.open(io.BytesIO(draw_curves([{"step": 1, "loss": 2.0}], "第一次"))).size == (1000, 680)


def test_a_resumed_log_is_drawn_and_a_failure_is_no_end(tmp_path, monkeypatch, caplog):
    write_steps(tmp_path, [1, 10])
    log = RunLog(tmp_path, 10, trackers=[])
    log.draw()
    before = (tmp_path / "loss.png").read_bytes()
    log.write(20, {"loss": 5.0})
    log.draw()
    assert (tmp_path / "loss.png").read_bytes() != before
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: 1 / 0)
    log.draw()
    log.draw()
    assert len(caplog.messages) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("low", "high"), [(0.3, 6.3), (0, 0), (1, 1), (-2, 3), (1e-9, 2e-4), (1, 100_000)])
def test_ticks_are_round_and_enclose_the_data(low, high):
    marks = ticks(low, high, 5)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 8


def test_the_moving_average_starts_at_the_first_value():
    points = smoothed([(1, 4.0), (2, 4.0), (3, 0.0)])
    assert [y for _, y in points[:2]] == pytest.approx([4.0, 4.0])
    assert 0 < points[2][1] < 4
