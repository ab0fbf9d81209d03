"""Drawn world of the demo: scenes, their pictures, facts with exactly one correct answer, Chinese captions.

A scene has 2 to 5 objects in a 3x3 grid of cells. No two objects share a cell, and no two share colour and shape, so
"the red circle" is always one object. All functions depend only on their arguments and a numpy Generator.
`demo/asking.py` puts the facts in words. Called by `demo/make_data.py` and `demo/pretrain.py`.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

PICTURE_PX = 384  # SigLIP's input size
PATCH_PX = 14
GRID = PICTURE_PX // PATCH_PX  # 27 patches a side; the last 6 px of the picture belong to no patch
CELL_PATCHES = GRID // 3

COLOURS = {
    "red": (210, 30, 30),
    "green": (24, 164, 54),
    "blue": (34, 80, 220),
    "yellow": (222, 196, 24),
    "purple": (154, 44, 194),
    "white": (220, 220, 220),
}
NOISE = 32  # 0..31 is added to every channel of every pixel, so drawn colours are at most 256 - NOISE
SHAPES = ("circle", "square", "triangle", "cross")
RADIUS_PX = {"small": 20, "large": 40}
SIZES = tuple(RADIUS_PX)
# One word each, so a place is one token.
CELLS = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
CHINESE = {
    **{"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "white": "白色"},
    **{"circle": "圆形", "square": "方形", "triangle": "三角形", "cross": "十字"},
    **{"northwest": "左上", "north": "上方", "northeast": "右上", "west": "左边", "center": "中间", "east": "右边"},
    **{"southwest": "左下", "south": "下方", "southeast": "右下", "large": "大的", "small": "小的"},
}
CAPTION_TEMPLATES = ("图中有{}。", "画面里有{}。", "这张图片画着{}。", "可以看到{}。", "图片上是{}。")
CAPTION_QUESTIONS = ("这幅图像描述了什么？", "这幅图像中有什么？")
TYPES = ("colour", "shape", "count", "position", "existence", "size", "description")

FOREIGN = "foreign"  # name of anything that the world never contains, such as a dog
FOREIGN_SHARE = 0.1  # of the questions about existence and number
# Small counts are possible in nearly every scene, large counts in few; these weights balance the answers.
COUNT_WEIGHT = {0: 1.0, 1: 1.0, 2: 1.2, 3: 1.8, 4: 3.0, 5: 4.0}


@dataclass(frozen=True)
class Thing:
    """One object. `row`, `column`: patch (0..26) of its centre; `offset`: from the middle of this patch, px."""

    colour: str
    shape: str
    size: str
    cell: int
    row: int
    column: int
    offset: tuple[int, int]
    radius: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return CELLS[self.cell]

    @property
    def centre(self) -> tuple[int, int]:
        """(x, y) in px."""
        half = PATCH_PX // 2
        return self.column * PATCH_PX + half + self.offset[0], self.row * PATCH_PX + half + self.offset[1]


Scene = tuple[Thing, ...]  # in reading order: by cell
Names = tuple[str, ...]  # of a colour, shape or place, in this order; () means all objects


@dataclass(frozen=True)
class Fact:
    """What a question of one form (`demo/wordings.py`) asks about a scene, and its only correct answer.

    Attributes:
        subjects: what is asked about, for example (("red", "circle"),); two in a comparison.
        answer: names, a digit, or yes or no; () for a description, which `description` and `captions` give.
        more: "large" or "small" in a comparison, as it is asked: is it larger, is it smaller?
    """

    form: str
    subjects: tuple[Names, ...]
    answer: Names
    more: str = ""


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw 2 to 5 objects, at least one small and one large; colours and shapes repeat, because there are few."""
    number = int(rng.integers(2, 6))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < number:
        palette = rng.choice(list(COLOURS), size=rng.integers(1, 5), replace=False)
        pairs = list(product(palette.tolist(), rng.choice(SHAPES, size=rng.integers(1, 5), replace=False).tolist()))
    chosen = rng.permutation(len(pairs))[:number]
    sizes = ["small", "large", *rng.choice(SIZES, size=number - 2).tolist()]
    rng.shuffle(sizes)
    cells = sorted(rng.choice(9, size=number, replace=False).tolist())
    looks = [pairs[int(index)] for index in chosen]
    return tuple(_thing(*look, size, cell, rng) for look, size, cell in zip(looks, sizes, cells, strict=True))


def _thing(colour: str, shape: str, size: str, cell: int, rng: np.random.Generator) -> Thing:
    reach = 1 if size == "large" else 2  # patches that the centre can move with the object inside its cell
    row, column = (int(start * CELL_PATCHES + 4 + rng.integers(-reach, reach + 1)) for start in divmod(cell, 3))
    offset = (int(rng.integers(-3, 4)), int(rng.integers(-3, 4)))
    return Thing(colour, shape, size, cell, row, column, offset, RADIUS_PX[size] + int(rng.integers(-2, 3)))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the 384x384 RGB picture: dark background, noise on all pixels, slightly varied colours.

    Every object has a dark dot at its centre. Without it, all patches inside a large object are similar, and an encoder
    of four layers would first have to learn to find the centre.
    """
    background = tuple(int(value) for value in rng.integers(2, 26, size=3))
    picture = Image.new("RGB", (PICTURE_PX, PICTURE_PX), background)
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        x, y = thing.centre
        shade = np.clip(COLOURS[thing.colour] + rng.integers(-14, 15, size=3), 0, 256 - NOISE)
        fill = tuple(shade.tolist())
        for outline in _outlines(thing.shape, x, y, thing.radius):
            if thing.shape == "circle":
                pen.ellipse(outline, fill=fill)
            else:
                pen.polygon(outline, fill=fill)
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(0, 0, 0))
    noise = np.frombuffer(rng.bytes(PICTURE_PX * PICTURE_PX * 3), dtype=np.uint8) % NOISE
    return Image.fromarray(np.asarray(picture) + noise.reshape(PICTURE_PX, PICTURE_PX, 3))


def _outlines(shape: str, x: int, y: int, radius: int) -> list[tuple]:
    if shape == "circle":
        return [(x - radius, y - radius, x + radius, y + radius)]
    if shape == "square":
        half = round(radius * 0.85)
        return [((x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half))]
    if shape == "triangle":
        return [((x, y - radius), (x + radius, y + round(radius * 0.8)), (x - radius, y + round(radius * 0.8)))]
    arm = round(radius * 0.3)
    return [
        ((x - radius, y - arm), (x + radius, y - arm), (x + radius, y + arm), (x - radius, y + arm)),
        ((x - arm, y - radius), (x + arm, y - radius), (x + arm, y + radius), (x - arm, y + radius)),
    ]


def fact(scene: Scene, rng: np.random.Generator, form: str, turn: int = 0) -> Fact:
    """Draw a fact of one form; with `turn` 0, 1, 2 … the answers yes and no alternate."""
    return _ASK[form](scene, rng, form, turn)


def description(scene: Scene) -> str:
    """Return the canonical sentence in reading order: 'northwest: red circle; center: blue square.'"""
    return "; ".join(f"{thing.place}: {thing.name}" for thing in scene) + "."


def captions(scene: Scene) -> list[str]:
    """Return five Chinese captions with the same content in reading order."""
    body = "、".join(f"{CHINESE[thing.place]}的{CHINESE[thing.colour]}{CHINESE[thing.shape]}" for thing in scene)
    return [template.format(body) for template in CAPTION_TEMPLATES]


def _pick(options: list | tuple, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _ask_attribute(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    """Ask for colour, shape or size. The object is named by its place, or by its looks if no other has the same."""
    thing = _pick(scene, rng)
    key = {"colour": "shape", "shape": "colour", "size": "name"}[form]
    alone = sum(getattr(other, key) == getattr(thing, key) for other in scene) == 1
    names = tuple(getattr(thing, key).split()) if alone and rng.random() < 0.6 else (thing.place,)
    return Fact(form, (names,), (getattr(thing, form),))


def _ask_count(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    if rng.random() < FOREIGN_SHARE:
        return Fact(form, ((FOREIGN,),), ("0",))
    by_count: dict[int, list[Names]] = {len(scene): [()]}
    for colour in COLOURS:
        by_count.setdefault(sum(thing.colour == colour for thing in scene), []).append((colour,))
    for shape in SHAPES:
        by_count.setdefault(sum(thing.shape == shape for thing in scene), []).append((shape,))
    weights = np.array([COUNT_WEIGHT[count] for count in by_count])
    count = int(rng.choice(list(by_count), p=weights / weights.sum()))
    return Fact(form, (_pick(by_count[count], rng),), (str(count),))


def _ask_position(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    thing = _pick(scene, rng)
    names: list[Names] = [(thing.colour, thing.shape)]
    if sum(other.shape == thing.shape for other in scene) == 1:
        names.append((thing.shape,))
    if sum(other.colour == thing.colour for other in scene) == 1:
        names.append((thing.colour,))
    return Fact(form, (_pick(names, rng),), (thing.place,))


def _ask_at(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    thing = _pick(scene, rng)
    return Fact(form, ((thing.place,),), (thing.colour, thing.shape))


def _ask_existence(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    """Ask for existence, yes and no alternately. A 'no' pair uses colour and shape of the scene (hard negative)."""
    yes = (turn + int(rng.integers(2))) % 2 == 0
    if not yes and rng.random() < 2 * FOREIGN_SHARE:
        return Fact(form, ((FOREIGN,),), ("no",))
    colours, shapes = {thing.colour for thing in scene}, {thing.shape for thing in scene}
    about = rng.choice(["pair", "colour", "shape"], p=[0.6, 0.2, 0.2])
    options: list[Names]
    if about == "pair":
        present = {(thing.colour, thing.shape) for thing in scene}
        absent = set(product(COLOURS, SHAPES)) - present
        hard = [pair for pair in sorted(absent) if pair[0] in colours and pair[1] in shapes]
        half = [pair for pair in sorted(absent) if (pair[0] in colours) != (pair[1] in shapes)]
        options = list(sorted(present) if yes else hard or half)
    elif about == "colour":
        options = [(colour,) for colour in COLOURS if (colour in colours) == yes]
    else:
        options = [(shape,) for shape in SHAPES if (shape in shapes) == yes]
    if not options:  # the scene has all four shapes
        return _ask_existence(scene, rng, form, turn)
    return Fact(form, (_pick(options, rng),), ("yes" if yes else "no",))


def _ask_compare(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    """Compare a large object with a small one: is the first one larger (smaller), or which one is?"""
    pair = [_pick([thing for thing in scene if thing.size == size], rng) for size in ("large", "small")]
    rng.shuffle(pair)
    more = _pick(SIZES, rng)
    wanted = next(thing for thing in pair if thing.size == more)
    first, second = ((thing.colour, thing.shape) for thing in pair)
    if form == "which":
        return Fact(form, (first, second), (wanted.colour, wanted.shape), more)
    return Fact(form, (first, second), ("yes" if wanted is pair[0] else "no",), more)


def _ask_description(scene: Scene, rng: np.random.Generator, form: str, turn: int) -> Fact:
    return Fact(form, (), ())


_ASK = {
    **dict.fromkeys(("colour", "shape", "size"), _ask_attribute),
    **dict.fromkeys(("compare", "which"), _ask_compare),
    **{form: globals()[f"_ask_{form}"] for form in ("count", "position", "at", "existence", "description")},
}
