"""The drawn world: scenes keep the rules, and pictures, captions and seeds agree with them."""

import numpy as np
import pytest

from demo.asking import questions
from demo.world import (
    CHINESE,
    COLOURS,
    GRID,
    PATCH_PX,
    PICTURE_PX,
    captions,
    draw,
    random_scene,
)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    return [random_scene(rng) for _ in range(400)]


def test_scenes_keep_the_rules(scenes):
    assert {len(scene) for scene in scenes} == {2, 3, 4, 5}
    for scene in scenes:
        assert len({thing.cell for thing in scene}) == len(scene)
        assert len({thing.name for thing in scene}) == len(scene)
        assert {thing.size for thing in scene} == {"small", "large"}
        assert [thing.cell for thing in scene] == sorted(thing.cell for thing in scene)


def test_captions_name_every_object_in_reading_order(scenes):
    for scene in scenes[:50]:
        variants = captions(scene)
        assert len(set(variants)) == 5
        for caption in variants:
            position = 0
            for thing in scene:
                words = f"{CHINESE[thing.place]}的{CHINESE[thing.colour]}{CHINESE[thing.shape]}"
                position = caption.index(words, position) + len(words)


def test_centre_patch_shows_the_objects_colour(scenes):
    for scene in scenes[:20]:
        pixels = np.asarray(draw(scene, np.random.default_rng(4))).astype(int)
        assert pixels.shape == (PICTURE_PX, PICTURE_PX, 3)
        for thing in scene:
            x, y = thing.centre
            assert (y // PATCH_PX, x // PATCH_PX) == (thing.row, thing.column)
            assert thing.cell == thing.row // (GRID // 3) * 3 + thing.column // (GRID // 3)
            patch = pixels[thing.row * PATCH_PX :, thing.column * PATCH_PX :][:PATCH_PX, :PATCH_PX]
            bright = patch.reshape(-1, 3)[patch.reshape(-1, 3).sum(1) > 150]  # without the dot and the background
            nearest = min(COLOURS, key=lambda name: np.abs(bright.mean(0) - COLOURS[name]).sum())
            assert nearest == thing.colour
            assert thing.radius < x - thing.cell % 3 * 126 < 126 - thing.radius  # inside its cell
            assert thing.radius < y - thing.cell // 3 * 126 < 126 - thing.radius


def test_the_seed_decides_everything():
    def world(seed):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng)
        return scene, np.asarray(draw(scene, rng)).tobytes(), questions(scene, rng)

    assert world(5) == world(5)
    assert world(5) != world(6)
