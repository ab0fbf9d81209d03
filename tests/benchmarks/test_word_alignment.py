"""The comparison of a new projector with one that was aligned first: both sides are trained and judged."""

import json
import sys

import pytest

from benchmarks import word_alignment
from errors import UserError
from tests.tiny import tiny_config


@pytest.fixture
def run(workshop, tmp_path, monkeypatch):
    def compare(passes, *more):
        config = tiny_config(
            workshop, data={"val_fraction": 0.4}, train={"word_alignment": passes, "log_steps": 1, "trackers": []}
        )
        (tmp_path / "run.yaml").write_text(config.model_dump_json(), encoding="utf-8")
        options = ["--config", tmp_path / "run.yaml", "--steps", "4", "--output", tmp_path / "out.json", *more]
        monkeypatch.setattr(sys, "argv", ["word_alignment", *map(str, options)])
        word_alignment.main()
        return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    return compare


@pytest.mark.nightly  # starts two programs
def test_both_sides_are_trained_and_judged(run):
    result = run(20, "--plain", "train.seed=0")
    assert result["plain"]["overrides"][-2:] == ["train.word_alignment=0", "train.seed=0"]
    for side in (result["plain"], result["aligned"]):
        assert list(side["val_losses"]) == ["1", "2", "3", "4"]
        assert -1 <= side["sameness"] <= 1
    losses = result["plain"]["val_losses"]["4"], result["aligned"]["val_losses"]["4"]
    assert result["loss_difference"] == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert result["plain"]["val_losses"] != result["aligned"]["val_losses"]


def test_without_passes_there_is_nothing_to_compare(run):
    with pytest.raises(UserError, match="both sides would be the same"):
        run(0)
