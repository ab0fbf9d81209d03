"""The drawn world: every question has the one answer the scene gives, and pictures and seeds agree with the scenes."""

import re
from collections import Counter

import numpy as np
import pytest

from demo.world import (
    CELLS,
    CHINESE,
    COLOURS,
    GRID,
    PATCH_PX,
    PICTURE_PX,
    SHAPES,
    TYPES,
    captions,
    draw,
    questions,
    random_scene,
)

SINGULAR = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    return [random_scene(rng) for _ in range(400)]


def named(scene, phrase):
    """All objects that a phrase such as 'red circle', 'circles', 'objects' or 'object in the northwest' fits."""
    words, _, place = phrase.partition(" in the ")
    fitting = [thing for thing in scene if not place or thing.place == place]
    for word in words.split():
        if word in COLOURS:
            fitting = [thing for thing in fitting if thing.colour == word]
        elif word not in ("object", "objects"):
            shape = SINGULAR.get(word, word)
            assert shape in SHAPES
            fitting = [thing for thing in fitting if thing.shape == shape]
    return fitting


def the(scene, phrase):
    (thing,) = named(scene, phrase)  # fails unless exactly one object is meant
    return thing


def true_answer(scene, question):
    """The answer, found from the question's words alone."""
    if found := re.match(r"(?:What|Which) colou?r (?:is|does) the (.+?)(?: have)?\?", question):
        return the(scene, found[1]).colour
    if found := re.match(r"(?:What|Which) shape (?:is|does) the (.+?)(?: have)?\?", question):
        return the(scene, found[1]).shape
    if found := re.match(r"How many (.+?) (?:are there|can you see)\?", question):
        return str(len(named(scene, found[1])))
    if found := re.match(r"(?:Where|In which part of the picture) is the (.+)\?", question):
        return the(scene, found[1]).place
    if found := re.match(r"(?:Is there|Can you see) a (.+?)(?: in the picture)?\?", question):
        return "yes" if named(scene, found[1]) else "no"
    if found := re.match(r"Is the (.+) larger than the (.+)\?", question):
        return "yes" if the(scene, found[1]).radius > the(scene, found[2]).radius else "no"
    assert question.startswith(("Describe", "What is in the picture"))
    in_order = sorted(scene, key=lambda thing: CELLS.index(thing.place))
    return "; ".join(f"{thing.place}: {thing.colour} {thing.shape}" for thing in in_order) + "."


def test_answers_are_the_only_right_ones(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes:
        rows = questions(scene, rng)
        assert {kind for kind, _, _ in rows} == set(TYPES)
        assert len({question for _, question, _ in rows}) == len(rows)
        for _, question, answer in rows:
            assert answer == true_answer(scene, question), question


def test_scenes_keep_the_rules(scenes):
    assert {len(scene) for scene in scenes} == {2, 3, 4, 5}
    for scene in scenes:
        assert len({thing.cell for thing in scene}) == len(scene)
        assert len({thing.name for thing in scene}) == len(scene)
        assert {thing.size for thing in scene} == {"small", "large"}
        assert [thing.cell for thing in scene] == sorted(thing.cell for thing in scene)


def test_guessing_scores_low(scenes):
    rng = np.random.default_rng(3)
    answers = {kind: Counter() for kind in TYPES}
    for scene in scenes:
        for kind, _, answer in questions(scene, rng):
            answers[kind][answer] += 1
    best_guess = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    limits = {"colour": 0.25, "shape": 0.35, "count": 0.3, "position": 0.2, "existence": 0.57, "size": 0.57}
    for kind, limit in (limits | {"description": 0.02}).items():
        assert best_guess[kind] < limit, kind


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
