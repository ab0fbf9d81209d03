"""Boxed objects of a drawn scene: what is asked about them, and how their part of the picture looks.

Used by `demo/make_data.py`, by both modules that pretrain, and by `benchmarks/looking.py`.
"""

import dataclasses

import numpy as np

from demo.world import CELLS, CHINESE, PATCH_PX, PICTURE_PX, Thing
from visual.region import Box

# "It" has no other referent than the box, so the whole photo alone does not answer these.
REGION_WORDINGS = {
    "colour": ("What colour is it?", "What color is this?"),
    "shape": ("What shape is it?", "Which shape is this?"),
    "object": ("What is it?", "What is this?"),
    "colour_zh": ("它是什么颜色？", "这是什么颜色？"),
    "shape_zh": ("它是什么形状？", "这是什么形状？"),
    "object_zh": ("它是什么？", "这是什么？"),
}
MARGIN_PX = (2, 12)  # between object and box on each side; the gap to a neighbour is 8 px or more


def object_box(thing: Thing, rng: np.random.Generator) -> Box:
    """Return a box around an object with a random margin on each side, as a person draws it, in pixels."""
    x, y = thing.centre
    margins = rng.integers(*MARGIN_PX, size=4, endpoint=True).tolist()
    edges = [middle + sign * (thing.radius + margin)
             for middle, sign, margin in zip((x, y, x, y), (-1, -1, 1, 1), margins, strict=True)]  # fmt: skip
    left, top, right, bottom = (min(max(edge, 0), PICTURE_PX) for edge in edges)
    return left, top, right, bottom


def in_its_part(thing: Thing, box: Box) -> Thing:
    """Return the object as the encoder sees it in the picture of the box: large, its centre in the middle.

    The part is enlarged to `PICTURE_PX`, so that both sizes of the world look the same there.
    """
    left, top, right, bottom = box
    x, y = thing.centre
    row, column = (int((middle - start) * PICTURE_PX / (end - start) // PATCH_PX)
                   for middle, start, end in ((y, top, bottom), (x, left, right)))  # fmt: skip
    return dataclasses.replace(thing, size="large", cell=CELLS.index("center"), row=row, column=column, offset=(0, 0))


def region_questions(thing: Thing, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return (type, question, answer) for one boxed object: its colour, its shape, and both, in both languages."""
    answers = {"colour": thing.colour, "shape": thing.shape, "object": thing.name}
    answers |= {f"{kind}_zh": "".join(CHINESE[word] for word in value.split()) for kind, value in answers.items()}
    return [
        (f"region {kind}", wordings[int(rng.integers(len(wordings)))], answers[kind])
        for kind, wordings in REGION_WORDINGS.items()
    ]
