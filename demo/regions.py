"""Questions about a boxed object of a drawn scene. Used by `demo/make_data.py` and `benchmarks/looking.py`."""

import numpy as np

from demo.world import PICTURE_PX, Thing
from visual.region import Box

# "It" has no other referent than the box, so the whole photo alone does not answer these.
REGION_WORDINGS = {
    "colour": ("What colour is it?", "What color is this?"),
    "shape": ("What shape is it?", "Which shape is this?"),
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


def region_questions(thing: Thing, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return (type, question, answer) for one boxed object: its colour and its shape, each in one wording."""
    answers = {"colour": thing.colour, "shape": thing.shape}
    return [
        (f"region {kind}", wordings[int(rng.integers(len(wordings)))], answers[kind])
        for kind, wordings in REGION_WORDINGS.items()
    ]
