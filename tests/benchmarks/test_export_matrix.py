"""The rows of the export matrix, without exports and programs."""

import json
import time

from benchmarks import export_matrix
from benchmarks.soak import CHECKPOINT
from model.checkpoint_folder import PROVENANCE_FILE, checksum


def test_a_row_tells_its_date_and_which_checkpoint_was_carried(monkeypatch, tmp_path, capsys):
    for name in ("load_checkpoint", "write_export"):
        monkeypatch.setattr(export_matrix, name, lambda *_, **__: None)
    monkeypatch.setattr(export_matrix, "row", lambda *_: {"versions": {"vllm": "1"}, "problems": []})
    file = tmp_path / "matrix.json"
    options = ["--checkpoint", str(CHECKPOINT), "--run", "vllm=python", "--output", str(file)]
    monkeypatch.setattr("sys.argv", ["export_matrix", *options])
    before = time.strftime("%Y-%m-%d")
    export_matrix.main()
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert row["date"] in (before, time.strftime("%Y-%m-%d"))
    assert row["checkpoint"] == CHECKPOINT.name
    assert row["weights"] == [checksum(CHECKPOINT / PROVENANCE_FILE)[:16]]
