"""The benchmarks can be imported on every system, and report no line through noise."""

import importlib.util
import sys

import pytest

from benchmarks.scaling import fit, fit_memory
from paths import REPO_ROOT


@pytest.mark.parametrize(
    "name",
    [
        "answer_batch",
        "backbone_tables",
        "fuzz",
        "fuzz_files",
        "fuzz_text",
        "record_memory",
        "scaling",
        "train_estimate",
        "train_step",
    ],
)
def test_import_needs_nothing_of_unix(name, monkeypatch):
    for module in ("resource", "fcntl", "termios"):  # Windows has none of them
        monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.spec_from_file_location(f"portable_{name}", REPO_ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert callable(getattr(module, "main", None)) or name.startswith("fuzz_")


def test_no_line_through_memory_that_does_not_grow():
    assert fit([1, 2, 4], [10.0, 20.0, 40.0]) == pytest.approx({"per_unit": 10.0, "worst_fit": 0.0})
    assert fit_memory([1, 2, 4], [20.0, 40.0, 80.0]) == pytest.approx({"per_unit": 20.0, "worst_fit": 0.0})
    assert fit_memory([1, 2, 4], [0.02, 40.0, 80.0]) is None
