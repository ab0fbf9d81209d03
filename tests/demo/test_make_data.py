"""The drawn data set: the same bytes for the same seed, all kinds of rows, photos of their own for the paraphrases."""

import json

import numpy as np
import pytest

from demo.make_data import PARAPHRASE_PHOTOS, _one_language, make_data
from demo.world import TYPES

BOTH = {kind + end for kind in (*TYPES, "unknown") for end in ("", "_zh")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    make_data(folder, photos=25, seed=3)
    return folder


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(folder, source):
    return json.loads((folder / source / "annotations.json").read_text(encoding="utf-8"))


def test_the_arguments_decide_every_byte(folder, tmp_path):
    make_data(tmp_path / "again", photos=25, seed=3)
    assert contents(tmp_path / "again") == contents(folder)
    make_data(tmp_path / "other", photos=25, seed=4)
    assert rows(tmp_path / "other", "llava") != rows(folder, "llava")


def test_training_data_has_all_kinds(folder):
    by_photo = {}
    for row in rows(folder, "llava"):
        by_photo.setdefault(row["image"], []).append(row)
    assert len(by_photo) == 20
    assert {row["type"] for own in by_photo.values() for row in own} == BOTH | {"dialogue"}
    for own in by_photo.values():
        kinds = [row["type"].removesuffix("_zh") for row in own]
        # long answers take most of the evaluation's time
        assert kinds.count("dialogue") == kinds.count("description") == 1
        assert kinds.count("unknown") <= 1
        assert len(own) <= 16  # `data.max_questions`: one sequence a photo
    dialogues = [row["conversations"] for own in by_photo.values() for row in own if row["type"] == "dialogue"]
    assert {len(turns) for turns in dialogues} == {4, 6, 8}
    for turns in dialogues:
        assert turns[0]["value"].startswith("<image>\n")
        assert not any("<image>" in turn["value"] for turn in turns[1:])


def test_a_quarter_of_the_photos_is_asked_what_needs_no_photo():
    rng = np.random.default_rng(0)
    asked = [(kind, "?", "!") for kind in sorted(BOTH)]
    kept = [{kind for kind, _, _ in _one_language(asked, rng)} for _ in range(400)]
    for suffix in ("", "_zh"):
        assert sum(f"unknown{suffix}" in kinds for kinds in kept) == pytest.approx(50, abs=20)  # three deviations
        assert sum(f"description{suffix}" in kinds for kinds in kept) == pytest.approx(200, abs=30)


def test_paraphrases_have_photos_of_their_own(folder):
    held_out = rows(folder, "paraphrases")
    assert len({row["image"] for row in held_out}) == PARAPHRASE_PHOTOS
    assert {row["type"] for row in held_out} == BOTH
    assert len(held_out) == PARAPHRASE_PHOTOS * len(BOTH)
    for file in (folder / "paraphrases" / "photos").iterdir():
        assert all(file.read_bytes() != other.read_bytes() for other in (folder / "llava" / "photos").iterdir())


def test_small_pictures_have_neither_places_nor_paraphrases(tmp_path):
    make_data(tmp_path, photos=3, seed=3, small=True)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
    kinds = {row["type"].removesuffix("_zh") for row in rows(tmp_path, "llava")}
    assert "colour" in kinds
    assert not kinds & {"position", "description", "dialogue"}
