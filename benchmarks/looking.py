"""How often a heatmap points to the named object, and how well a box is understood, in the demo.

    python -m benchmarks.looking --checkpoint checkpoints/demo/checkpoint-240
    python -m benchmarks.looking --checkpoint DIR --photos 20 --figure docs/looking.png

and `--output FILE.json` to keep the figures (benchmarks/results/looking.json).

Heatmaps: colour questions on new drawn scenes, each about one object, named by its shape if no other object has it, or
by its place. A map is right if its largest value (`raw`), or the cell of the world's 3 × 3 with the largest mean
(`cell`), is that of the named object. `by_chance` is the share of a map that points to any object at random. The best
setting has the largest `cell` (then `raw`, then the earlier line) on the scenes of `--seed`; the shares on other
scenes, which the choice has not seen, are the ones to report.

Regions: scenes of three objects, one of them boxed. `beside`: photo and part, what `--box` shows; `alone`: the part as
the only photo; `blanked`: the photo with black around the box; `whole`: the photo without a box. Each is asked for the
colour of "it", which only the box names, and for that of the shape, which two of the objects may have.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cli import run_script

import numpy as np
import torch
from PIL import Image, ImageDraw

from answering.answer import Answerer
from answering.heat_picture import draw_heatmap
from answering.heatmap import Heatmap, Method, look
from answering.request import PhotoSource, Reply, Request
from benchmarks.report import write_report
from demo.regions import REGION_WORDINGS, object_box
from demo.world import CELL_PATCHES, PATCH_PX, PICTURE_PX, Scene, Thing, draw, random_scene
from evaluation.report import text_font
from model.checkpoint import load_checkpoint
from visual.region import Box, Region

SHOWN = 4  # questions of the figure
TEXT_PX, GAP_PX = 66, 10


class MapSetting(NamedTuple):
    """A method, and the layers whose attention is averaged."""

    method: Method
    layers: tuple[int, ...] | None = None


class ColourQuestion(NamedTuple):
    picture: Image.Image
    scene: Scene
    thing: Thing
    text: str


def settings(layers: int) -> dict[str, MapSetting]:
    """Gradient, and attention of several choices of `layers` layers."""
    parts = {
        "all": range(layers),
        "first half": range(layers // 2),
        "second half": range(layers // 2, layers),
        "middle half": range(layers // 4, layers - layers // 4),
        "last": range(layers - 1, layers),
    }
    attention = {f"attention, layers: {name}": MapSetting("attention", tuple(part)) for name, part in parts.items()}
    return {"gradient": MapSetting("gradient")} | attention


def colour_questions(seed: int, count: int) -> list[ColourQuestion]:
    rng = np.random.default_rng([seed, 11])
    asked = []
    for _ in range(count):
        scene = random_scene(rng)
        thing = scene[int(rng.integers(len(scene)))]
        alone = sum(other.shape == thing.shape for other in scene) == 1
        name = thing.shape if alone else f"object in the {thing.place}"
        asked.append(ColourQuestion(draw(scene, rng), scene, thing, f"What colour is the {name}?"))
    return asked


def found_cells(found: Heatmap) -> tuple[int, int]:
    """Return the cells of the largest value and of the largest mean."""
    side = CELL_PATCHES * PATCH_PX
    rows, columns = (
        np.minimum((np.arange(length) + 0.5) * PICTURE_PX / length // side, 2).astype(int)
        for length in found.values.shape
    )
    cells = 3 * rows[:, None] + columns
    means = [np.nanmean(found.values[cells == cell]) for cell in range(9)]
    return int(cells.flat[np.nanargmax(found.values)]), int(np.argmax(means))


def heatmap_shares(answerer: Answerer, seed: int, count: int) -> dict:
    """Return the share of right answers, that by chance, and the shares of right maps for each setting."""
    model = answerer.model
    choices = settings(model.LLM.config.num_hidden_layers)
    hits: dict[str, list[tuple[bool, bool]]] = {name: [] for name in choices}
    right, chance = [], []
    for question in colour_questions(seed, count):
        request = Request([question.picture], [model.processor.chat.typed_question(question.text, 1)])
        answer = answerer.stream_messages(*request).rest().text
        right.append(answer.strip() == question.thing.colour)
        chance.append(1 / len(question.scene))
        for name, (method, layers) in choices.items():
            [found] = look(model, request, answer, method=method, layers=layers)
            raw, cell = found_cells(found)
            hits[name].append((raw == question.thing.cell, cell == question.thing.cell))
    shares = {name: [round(float(share), 3) for share in np.mean(pairs, axis=0)] for name, pairs in hits.items()}
    return {
        "questions": count,
        "answered_right": round(float(np.mean(right)), 3),
        "by_chance": round(float(np.mean(chance)), 3),
        "maps": {name: {"cell": cell, "raw": raw} for name, (raw, cell) in shares.items()},
    }


def blanked(picture: Image.Image, box: Box) -> Image.Image:
    photo = Image.new("RGB", picture.size)
    left, top, right, bottom = (int(edge) for edge in box)
    photo.paste(picture.crop((left, top, right, bottom)), (left, top))
    return photo


SHOW: dict[str, Callable[[Image.Image, Box], list[PhotoSource]]] = {
    "beside": lambda picture, box: [picture, Region(picture, box)],
    "alone": lambda picture, box: [Region(picture, box)],
    "blanked": lambda picture, box: [blanked(picture, box)],
    "whole": lambda picture, box: [picture],
}


def region_shares(answerer: Answerer, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Return the share of right colours by what is shown and how the object is named."""
    rng = np.random.default_rng([seed, 12])
    requests, truths = [], []
    while len(truths) < count:
        scene = random_scene(rng)
        if len(scene) != 3:
            continue
        thing = scene[int(rng.integers(3))]
        picture, box = draw(scene, rng), object_box(thing, rng)
        truths.append(thing.colour)
        for show in SHOW.values():
            photos = show(picture, box)
            for text in (REGION_WORDINGS["colour"][0], f"What colour is the {thing.shape}?"):
                requests.append(Request(photos, [answerer.model.processor.chat.typed_question(text, len(photos))]))
    texts = [reply.text if isinstance(reply, Reply) else "" for reply in answerer.answer_many(requests)]
    right = np.array([text.strip() for text in texts]).reshape(count, len(SHOW), 2) == np.array(truths)[:, None, None]
    return {
        name: {asked: round(float(right[:, row, column].mean()), 3) for column, asked in enumerate(("it", "shape"))}
        for row, name in enumerate(SHOW)
    }


def draw_figure(file: Path, answerer: Answerer, seed: int) -> None:
    """Draw the maps of both methods for a few questions, below the photos."""
    font, _ = text_font(16)
    rows = ("photo", "gradient", "attention")
    edge = PICTURE_PX * 2 // 3
    size = (SHOWN * (edge + GAP_PX) - GAP_PX, TEXT_PX + len(rows) * (edge + GAP_PX) - GAP_PX)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    questions = [question for question in colour_questions(seed, 10 * SHOWN) if len(question.scene) > 3]
    for column, question in enumerate(questions[:SHOWN]):
        messages = [{"role": "user", "content": question.text}]
        answer = answerer.stream(question.picture, messages).rest().text
        left = column * (edge + GAP_PX)
        for number, line in enumerate((*_in_two(question.text), f"{answer}")):
            pen.text((left, 2 + 20 * number), line, font=font, fill="black")
        pictures = [question.picture]
        for method in rows[1:]:
            [found] = answerer.look(question.picture, messages, answer, method=method)
            pictures.append(draw_heatmap(found, question.picture))
        for row, picture in enumerate(pictures):
            page.paste(picture.resize((edge, edge), Image.Resampling.LANCZOS), (left, TEXT_PX + row * (edge + GAP_PX)))
    page.save(file, format="PNG")


def _in_two(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[:4]), " ".join(words[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint of the demo")
    parser.add_argument("--photos", type=int, default=50, help="of each measurement of maps (default 50)")
    parser.add_argument("--boxes", type=int, default=100, help="of the measurement of boxes (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes that choose the default (default 0)")
    parser.add_argument("--skip", choices=["heatmaps", "regions"], help="leave one of the two out")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the maps of a few questions")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON")
    options = parser.parse_args()
    answerer = Answerer(load_checkpoint(options.checkpoint.absolute(), device="cpu", dtype=torch.float32))
    report: dict = {"checkpoint": options.checkpoint.name}
    if options.skip != "heatmaps":
        chosen_on = heatmap_shares(answerer, options.seed, options.photos)
        maps = chosen_on["maps"]
        best = max(maps, key=lambda name: (maps[name]["cell"], maps[name]["raw"]))
        report["heatmaps"] = {
            "best": best,
            "chosen_on": chosen_on,
            "reported": heatmap_shares(answerer, options.seed + 1, options.photos),
        }
    if options.skip != "regions":
        report["regions"] = {"questions": options.boxes, **region_shares(answerer, options.seed, options.boxes)}
    write_report(report, options.output)
    if options.figure is not None:
        draw_figure(options.figure, answerer, options.seed + 2)


if __name__ == "__main__":
    run_script(main)
