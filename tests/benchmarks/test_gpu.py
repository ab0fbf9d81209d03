"""The command for a GPU, run without one."""

import pytest

from benchmarks import gpu
from benchmarks.gpu_checks import Bar

pytestmark = pytest.mark.skipif(gpu.GPU, reason="on a GPU, the command itself is the test")


def test_attention_equals_flex_attention():
    checked = gpu.run_apart("attention")
    assert checked["status"] == "passed"
    assert checked["bars"][0]["name"] == "largest relative difference"
    assert checked["bars"][0]["value"] < 1e-5  # float32, other orders of sums


@pytest.mark.parametrize(("value", "correctness", "status"), [(2.0, True, "failed"), (2.0, False, "passed")])
def test_bars_of_speed_do_not_count_without_a_gpu(monkeypatch, value, correctness, status):
    bar = Bar("a figure", value, at_most=1.0, correctness=correctness)
    monkeypatch.setitem(gpu.CHECKS, "attention", lambda: ({}, [bar]))
    checked = gpu.run("attention")
    assert checked["status"] == status
    assert not checked["bars"][0]["met"]


def test_a_check_that_breaks_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    found = {"attention": {"status": "failed: status 1, the reason is printed above"}, "step": {"status": "passed"}}
    monkeypatch.setattr(gpu, "run_apart", found.__getitem__)
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "attention", "step", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    assert '"passed"' in (tmp_path / "gpu.json").read_text()
