"""The command for a GPU, run without one."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

from batch import Batch
from benchmarks import gpu
from benchmarks.gpu_checks import Bar
from paths import REPO_ROOT

pytestmark = pytest.mark.skipif(gpu.GPU, reason="on a GPU, the command itself is the test")


def test_attention_equals_flex_attention():
    checked = gpu.run_apart("attention")
    assert checked["status"] == "passed"
    assert checked["bars"][0]["name"] == "largest relative difference"
    assert checked["bars"][0]["value"] < 1e-5  # float32, other orders of sums


@pytest.mark.nightly  # minutes
def test_the_whole_command_runs_to_its_end_without_a_gpu(tmp_path):
    report = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--output", report], cwd=REPO_ROOT, check=False)
    checks = json.loads(report.read_text(encoding="utf-8"))["checks"]
    left_out = {"pinned": "skipped: without a GPU there is nothing to copy to"}
    expected = dict.fromkeys(gpu.CHECKS, "passed") | left_out
    assert {name: check["status"] for name, check in checks.items()} == expected
    assert done.returncode == 0


def test_what_cannot_be_measured_is_neither_met_nor_missed(monkeypatch):
    monkeypatch.setitem(gpu.CHECKS, "attention", lambda: ({}, [Bar("peak", None, at_most=20.0)]))
    checked = gpu.run("attention")
    assert checked["status"] == "passed"
    assert (checked["bars"][0]["value"], checked["bars"][0]["met"]) == (None, None)


def test_the_copies_of_photos_are_timed(monkeypatch):
    """Without a GPU there is no page-locked memory; the rest of the check runs."""
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    figures, (bar,) = gpu.CHECKS["pinned"]()
    assert figures["milliseconds"].keys() == {"pageable", "pinned"}
    assert bar.value > 0
    assert gpu.run("pinned")["status"].startswith("skipped")


@pytest.mark.parametrize(("value", "correctness", "status"), [(2.0, True, "failed"), (2.0, False, "passed")])
def test_bars_of_speed_do_not_count_without_a_gpu(monkeypatch, value, correctness, status):
    bar = Bar("a figure", value, at_most=1.0, correctness=correctness)
    monkeypatch.setitem(gpu.CHECKS, "attention", lambda: ({}, [bar]))
    checked = gpu.run("attention")
    assert checked["status"] == status
    assert not checked["bars"][0]["met"]


def test_a_check_that_breaks_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    found = {"attention": {"status": "failed: status 1, the reason is printed above"}, "step": {"status": "passed"}}
    monkeypatch.setattr(gpu, "run_apart", lambda name, seconds: found[name])
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "attention", "step", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    assert '"passed"' in (tmp_path / "gpu.json").read_text()


def test_checks_beyond_the_total_time_are_not_run_and_not_passed(monkeypatch, tmp_path, capsys):
    given, clock = {}, [0.0]

    def check(name, seconds):
        given[name] = seconds
        clock[0] += 200
        return {"status": "passed"}

    monkeypatch.setattr(gpu, "run_apart", check)
    monkeypatch.setattr(gpu, "MEASURED", tmp_path / "measured.json")
    gpu.MEASURED.write_text('{"checks": {}}', encoding="utf-8")
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 300)
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 250)
    names = ["attention", "step", "compiled", "estimate"]
    monkeypatch.setattr("sys.argv", ["gpu", "--only", *names, "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    checks = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["checks"]
    assert [checks[name]["status"] for name in names] == ["passed"] * 2 + ["not run: the time was over"] * 2
    assert "2 passed, 2 not run" in capsys.readouterr().err
    assert given == {"attention": 250, "step": 100}  # its own limit, and the rest


def test_a_check_that_the_time_ends_is_not_run():
    assert gpu.run_apart("attention", 0.05) == {"status": "not run: the time was over"}


def test_children_of_a_check_end_with_it(monkeypatch):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    wait, children, deadline = psutil.Popen.wait, [], time.monotonic() + 30

    def over(process, timeout=None):
        if children:
            return wait(process, timeout)
        while not children:  # the time is over as soon as the check has a child
            assert time.monotonic() < deadline
            time.sleep(0.05)
            children.extend(process.children())
        raise psutil.TimeoutExpired(timeout)

    monkeypatch.setattr(psutil.Popen, "wait", over)
    assert gpu.status_within([sys.executable, "-c", code], 1) is None
    with contextlib.suppress(psutil.NoSuchProcess):
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            time.sleep(0.05)  # it has got the signal; one that had not would sleep for a minute
            assert time.monotonic() < deadline


def test_the_status_of_a_check_is_returned():
    assert gpu.status_within([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_checks_without_figures_come_first(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "MEASURED", tmp_path / "gpu.json")
    measured = {"step": {"status": "failed", "figures": {}}, "estimate": {"status": "failed: longer than 240 seconds"}}
    gpu.MEASURED.write_text(json.dumps({"checks": measured}))
    assert gpu.in_order(["step", "estimate", "answers"]) == ["estimate", "answers", "step"]
