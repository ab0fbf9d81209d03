"""A demo checkpoint becomes the shipped one, with the scores of its evaluations."""

import json

import pytest

from demo.ship import ship
from errors import UserError


@pytest.fixture
def folders(tmp_path):
    """A checkpoint with two evaluations, the place of the shipped one, and the file of scores."""
    checkpoint, shipped, scores = tmp_path / "checkpoint-9", tmp_path / "shipped", tmp_path / "scores.json"
    scored = {
        "by_type": {
            "colour": {"accuracy": 0.5, "questions": 30},
            "count_zh": {"accuracy": 1.0, "questions": 10},
            "unknown_zh": {"accuracy": 1.0, "questions": 60},
        },
        "overall": {"accuracy": 0.85, "questions": 100},
    }
    for folder in ("eval_val", "eval_paraphrases", "trainer_state"):
        (checkpoint / folder).mkdir(parents=True)
        (checkpoint / folder / "metrics.json").write_text(json.dumps({"passes": {"trained": scored, "blind": scored}}))
    (checkpoint / "config.yaml").write_text("new")
    shipped.mkdir()
    (shipped / "old.safetensors").write_text("old")
    scores.write_text('{"encoder": {"scores": 1}, "checkpoint": {"scores": 0}}')
    return checkpoint, shipped, scores


def test_the_checkpoint_takes_the_place_of_the_old_one(folders):
    _, shipped, scores = folders
    ship(*folders)
    assert [file.name for file in shipped.iterdir()] == ["config.yaml"]
    records = json.loads(scores.read_text())
    assert records["encoder"] == {"scores": 1}
    found = records["checkpoint"]["scores"]["held-out photos, with another photo"]
    assert found == {"colour": 0.5, "count_zh": 1.0, "unknown_zh": 1.0, "all but unknown": 0.625, "all": 0.85}


def test_what_is_shipped_is_not_shipped_again(folders):
    checkpoint, _, scores = folders
    with pytest.raises(UserError, match="is what is shipped already"):
        ship(checkpoint, checkpoint, scores)
    assert (checkpoint / "config.yaml").read_text() == "new"


def test_without_an_evaluation_nothing_changes(folders):
    checkpoint, shipped, scores = folders
    before = scores.read_text()
    (checkpoint / "eval_paraphrases" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="eval_paraphrases"):
        ship(*folders)
    assert (scores.read_text(), [file.name for file in shipped.iterdir()]) == (before, ["old.safetensors"])
