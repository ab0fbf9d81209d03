"""Drawn world of the demo: scenes, their pictures, questions with exactly one correct answer, Chinese captions.

A scene has 2 to 5 objects in a 3x3 grid of cells. No two objects share a cell, and no two share colour and shape, so
"the red circle" is always one object. All functions depend only on their arguments and a numpy Generator.
Called by `demo/make_data.py` (photos and annotations) and `demo/pretrain.py` (the two backbones).
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
    **{"southwest": "左下", "south": "下方", "southeast": "右下"},
}
CAPTION_TEMPLATES = ("图中有{}。", "画面里有{}。", "这张图片画着{}。", "可以看到{}。", "图片上是{}。")
CAPTION_QUESTIONS = ("这幅图像描述了什么？", "这幅图像中有什么？")
TYPES = ("colour", "shape", "count", "position", "existence", "size", "description")

WORDINGS = {
    "colour": ("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"),
    "shape": ("What shape is the {}?", "Which shape does the {} have?"),
    "count": ("How many {} are there?", "How many {} can you see?"),
    "position": ("Where is the {}?", "In which part of the picture is the {}?"),
    "existence": ("Is there a {}?", "Can you see a {}?", "Is there a {} in the picture?"),
    "size": ("Is the {}?",),
    "description": ("Describe the picture.", "What is in the picture?", "Describe the following image."),
}
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


def questions(scene: Scene, rng: np.random.Generator, per_type: int = 2) -> list[tuple[str, str, str]]:
    """Return (type, question, answer), `per_type` of each type and one description, without repetition."""
    rows = []
    for kind in TYPES:
        for subject, answer in facts(scene, rng, kind, 1 if kind == "description" else per_type):
            rows.append((kind, _pick(WORDINGS[kind], rng).format(subject), answer))
    return rows


def facts(scene: Scene, rng: np.random.Generator, kind: str, number: int) -> list[tuple[str, str]]:
    """Return up to `number` different (subject, answer) of one type, for example ("red circle", "north")."""
    found: dict[str, str] = {}
    for turn in range(number * 4):  # extra tries, because a small scene may give the same subject again
        subject, answer = _ASK[kind](scene, rng, turn)
        found.setdefault(subject, answer)
        if len(found) == number:
            break
    return list(found.items())


def description(scene: Scene) -> str:
    """Return the canonical sentence in reading order: 'northwest: red circle; center: blue square.'"""
    return "; ".join(f"{thing.place}: {thing.name}" for thing in scene) + "."


def captions(scene: Scene) -> list[str]:
    """Return five Chinese captions with the same content in reading order."""
    body = "、".join(f"{CHINESE[thing.place]}的{CHINESE[thing.colour]}{CHINESE[thing.shape]}" for thing in scene)
    return [template.format(body) for template in CAPTION_TEMPLATES]


def _pick(options: list | tuple, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _ask_attribute(scene: Scene, rng: np.random.Generator, kind: str, key: str, key_name: str) -> tuple[str, str]:
    """Ask for `kind` of one object, identified by its place or by its `key` if that is unique."""
    thing = _pick(scene, rng)
    same_key = [other for other in scene if getattr(other, key) == getattr(thing, key)]
    by_key = len(same_key) == 1 and rng.random() < 0.6
    referent = key_name.format(getattr(thing, key)) if by_key else f"object in the {thing.place}"
    return referent, getattr(thing, kind)


def _ask_colour(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    return _ask_attribute(scene, rng, "colour", "shape", "{}")


def _ask_shape(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    return _ask_attribute(scene, rng, "shape", "colour", "{} object")


def _ask_count(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    by_count: dict[int, list[str]] = {len(scene): ["objects"]}
    for colour in COLOURS:
        by_count.setdefault(sum(thing.colour == colour for thing in scene), []).append(f"{colour} objects")
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        by_count.setdefault(sum(thing.shape == shape for thing in scene), []).append(plural)
    weights = np.array([COUNT_WEIGHT[count] for count in by_count])
    count = int(rng.choice(list(by_count), p=weights / weights.sum()))
    return _pick(by_count[count], rng), str(count)


def _ask_position(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    thing = _pick(scene, rng)
    referents = [thing.name]
    if sum(other.shape == thing.shape for other in scene) == 1:
        referents.append(thing.shape)
    if sum(other.colour == thing.colour for other in scene) == 1:
        referents.append(f"{thing.colour} object")
    return _pick(referents, rng), thing.place


def _ask_existence(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    """Ask for existence, yes and no alternately. A 'no' pair uses colour and shape of the scene (hard negative)."""
    yes = (turn + int(rng.integers(2))) % 2 == 0
    colours, shapes = {thing.colour for thing in scene}, {thing.shape for thing in scene}
    form = rng.choice(["pair", "colour", "shape"], p=[0.6, 0.2, 0.2])
    if form == "pair":
        present = {(thing.colour, thing.shape) for thing in scene}
        absent = set(product(COLOURS, SHAPES)) - present
        hard = [pair for pair in sorted(absent) if pair[0] in colours and pair[1] in shapes]
        half = [pair for pair in sorted(absent) if (pair[0] in colours) != (pair[1] in shapes)]
        options = [" ".join(pair) for pair in (sorted(present) if yes else hard or half)]
    elif form == "colour":
        options = [f"{colour} object" for colour in COLOURS if (colour in colours) == yes]
    else:
        options = [shape for shape in SHAPES if (shape in shapes) == yes]
    if not options:  # the scene has all four shapes
        return _ask_existence(scene, rng, turn)
    return _pick(options, rng), "yes" if yes else "no"


def _ask_size(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    large = _pick([thing for thing in scene if thing.size == "large"], rng)
    small = _pick([thing for thing in scene if thing.size == "small"], rng)
    first, second = (large, small) if rng.random() < 0.5 else (small, large)
    return f"{first.name} larger than the {second.name}", "yes" if first is large else "no"


def _ask_description(scene: Scene, rng: np.random.Generator, turn: int) -> tuple[str, str]:
    return "", description(scene)


_ASK = {kind: globals()[f"_ask_{kind}"] for kind in TYPES}
