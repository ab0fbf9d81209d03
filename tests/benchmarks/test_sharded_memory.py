"""The peak memory of sharded training beside its formula."""

import json
import subprocess
import sys

import pytest

from paths import REPO_ROOT


@pytest.mark.nightly  # half a minute
def test_the_command_runs_to_its_end(tmp_path):
    report = tmp_path / "memory.json"
    words = ["benchmarks.sharded_memory", "--shape", "tiny", "--processes", "1", "2", "--output", str(report)]
    subprocess.run([sys.executable, "-m", *words], cwd=REPO_ROOT, check=True)
    found = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert [result["processes"] for result in found] == [1, 2]
    assert all(result["peak_mib"] > result["formula_mib"] > 0 for result in found)
