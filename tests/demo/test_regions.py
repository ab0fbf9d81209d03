"""Boxed objects of the demo: the box holds the object and no other one's middle, and the answers are the object's."""

import json

import numpy as np
import pytest
from PIL import Image

from demo.make_data import make_data
from demo.regions import REGION_WORDINGS, in_its_part, object_box, region_questions
from demo.world import CHINESE, PATCH_PX, PICTURE_PX, draw, random_scene
from visual.region import pixel_box


def test_a_box_holds_its_object_alone():
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = random_scene(rng)
        for thing in scene:
            left, top, right, bottom = pixel_box(object_box(thing, rng), PICTURE_PX, PICTURE_PX)
            x, y = thing.centre
            assert left <= x - thing.radius
            assert right >= min(x + thing.radius, PICTURE_PX)
            assert top <= y - thing.radius
            assert bottom >= min(y + thing.radius, PICTURE_PX)
            others = [other.centre for other in scene if other is not thing]
            assert not any(left < x < right and top < y < bottom for x, y in others)


def test_the_middle_of_a_part_is_where_its_picture_has_it():
    """Every object has a dark dot at its middle; in the enlarged part it is in the patch that `in_its_part` names."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        scene = random_scene(rng)
        thing = scene[int(rng.integers(len(scene)))]
        box = object_box(thing, rng)
        part = draw(scene, rng).crop(tuple(map(int, box))).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
        seen = in_its_part(thing, box)
        assert (seen.colour, seen.shape, seen.size, seen.place) == (thing.colour, thing.shape, "large", "center")
        top, left = seen.row * PATCH_PX, seen.column * PATCH_PX
        patch = np.asarray(part)[top : top + PATCH_PX, left : left + PATCH_PX].max(2)
        assert (patch < 80).mean() > 0.5, (thing, box)


def test_questions_are_about_the_boxed_object():
    rng = np.random.default_rng(4)
    for _ in range(50):
        [thing, *_] = random_scene(rng)
        rows = region_questions(thing, rng)
        assert [(kind, answer) for kind, _, answer in rows] == [
            ("region colour", thing.colour),
            ("region shape", thing.shape),
            ("region object", thing.name),
            ("region colour_zh", CHINESE[thing.colour]),
            ("region shape_zh", CHINESE[thing.shape]),
            ("region object_zh", CHINESE[thing.colour] + CHINESE[thing.shape]),
        ]
        assert all(question in REGION_WORDINGS[kind.split()[1]] for kind, question, _ in rows)


@pytest.mark.parametrize("small", [False, True])
def test_rows_name_photos_of_the_questions_with_one_box_each(tmp_path, small):
    make_data(tmp_path, 40, seed=0, small=small)
    file = tmp_path / "regions" / "annotations.json"
    assert file.exists() != small
    if not small:
        rows = json.loads(file.read_text())
        boxes = {row["image"]: tuple(row["box"]) for row in rows}
        assert len(rows) == 6 * len(boxes)
        assert 4 <= len(boxes) <= 20  # a third of 32
        assert all(boxes[row["image"]] == tuple(row["box"]) for row in rows)
        assert all((tmp_path / "llava" / "photos" / name).is_file() for name in boxes)
