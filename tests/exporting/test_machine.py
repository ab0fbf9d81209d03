"""What a machine that is full or too small does to an export: one sentence, and nothing is left behind."""

import errno
import subprocess

import pytest

import export as script
from errors import UserError
from exporting import stock_check, write
from exporting.write import check_export, write_export
from tests.exporting.conftest import FACTS


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def short(*_):
    raise OSError("9 requested and 4 written")  # as numpy tells it


FULL = {
    "the weights": (write.TARGETS["llava"], "write", short),
    "the figures of the comparison": (stock_check, "save_file", full),
    "the report": (write.orjson, "dumps", full),
    "the model card": (write, "write_card", full),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_leaves_nothing_and_blames_no_folder(tiny_checkpoint, tmp_path, same_process, monkeypatch, where):
    place, name, failing = FULL[where]
    compared = subprocess.run  # of `same_process`

    def run(command, **options):
        try:
            return compared(command, **options)
        except SystemExit as end:
            return subprocess.CompletedProcess(command, end.code, "", "No space left on device\n")

    monkeypatch.setattr(subprocess, "run", run)
    if name == "write":
        monkeypatch.setitem(write.TARGETS, "llava", place._replace(write=failing))
    else:
        monkeypatch.setattr(place, name, failing)
    options = ["--checkpoint", str(tiny_checkpoint), f"model_root={tiny_checkpoint.parent.parent.parent}"]
    with pytest.raises(UserError, match=r"out: .*(No space left on device|is the disk full\?)"):
        script.main([*options, "--output", str(tmp_path / "out"), "generate.max_new_tokens=2"])
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_the_system_ends_is_no_verdict(make, tmp_path, monkeypatch):
    written = write_export(make(), tmp_path / "out", "llava", FACTS)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", ""))
    with pytest.raises(UserError, match="the comparing process was killed, which the system does when memory runs out"):
        check_export(written)
    assert list(tmp_path.iterdir()) == []
