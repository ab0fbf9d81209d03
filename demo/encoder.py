"""Pretraining of the demo's SigLIP encoder on drawn scenes only. Run by `python -m demo.pretrain encoder`.

Target: a linear layer on the post-layernorm `last_hidden_state` reads colour, shape, size and cell at the patch of an
object's centre, and "none" at every other patch. The language model then gets a few informative tokens among 728.
Half of the whole pictures are parts of scenes: one object, enlarged as a box enlarges it.
"""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import SiglipVisionConfig, SiglipVisionModel

from demo.optimizers import make_optimizers, set_rate, take_step
from demo.regions import in_its_part, object_box
from demo.world import (
    CELL_PATCHES,
    CELLS,
    COLOURS,
    GRID,
    PATCH_PX,
    PICTURE_PX,
    SHAPES,
    SIZES,
    Scene,
    draw,
    random_scene,
)

NAMES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "cell": CELLS}
WIDTH = 64
HEAD_WIDTH = 16
LOCAL_HEADS = 3  # of 4
CELL_STEPS = 400  # steps on single cells at the start
NONE_WEIGHT = 0.1  # loss weight of a "none" patch relative to an object's patch


class PatchReader(nn.Module):
    """A SigLIP encoder and one linear layer per attribute (discarded after pretraining)."""

    def __init__(self) -> None:
        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=WIDTH // HEAD_WIDTH,
            image_size=PICTURE_PX,
            patch_size=PATCH_PX,
            vision_use_head=False,  # only patch features are used
        )
        self.encoder = SiglipVisionModel(config)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, 1 + len(values)) for name, values in NAMES.items()})
        self._look_nearby()

    @torch.no_grad()
    def _look_nearby(self) -> None:
        """Initialise attention to near patches: the first 16 features encode the position; most heads use only them.

        Shape and size depend on the object's outline, a few patches away. From a random start, finding this among 729
        patches takes most of the training time.
        """
        embeddings = self.encoder.embeddings
        embeddings.position_embedding.weight.normal_(0, 0.02)[:, :HEAD_WIDTH] = _sine_positions()
        embeddings.patch_embedding.weight[:HEAD_WIDTH] = 0
        for layer in self.encoder.encoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                for head in range(LOCAL_HEADS):
                    rows = projection.weight[head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH]
                    rows[:, :HEAD_WIDTH] = 2 * torch.eye(HEAD_WIDTH)
                    rows[:, HEAD_WIDTH:] = 0

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Encode patches: pixels (B, 3, H, W) and positions (B, N) in the 27x27 grid -> (B, N, WIDTH)."""
        patches = self.encoder.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        hidden = patches + self.encoder.embeddings.position_embedding(positions)
        hidden = self.encoder.encoder(inputs_embeds=hidden).last_hidden_state
        return self.encoder.post_layernorm(hidden)


def _sine_positions() -> Tensor:
    """Sines and cosines of row and column with wavelengths of 7 to 40 patches, (GRID * GRID, 16)."""
    angles = 2 * math.pi * torch.arange(GRID)[:, None] / torch.tensor([7.0, 12.0, 20.0, 40.0])  # (27, 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(GRID, GRID, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=-1).reshape(GRID * GRID, HEAD_WIDTH)


def pixel_values(pictures: Tensor) -> Tensor:
    """Scale (B, 3, H, W) bytes to -1..1, as SigLIP's image processor does for a picture of the right size."""
    return pictures.float() / 127.5 - 1


def label_grid(scene: Scene) -> np.ndarray:
    """Class of every patch for colour, shape, size and cell, (4, 27, 27); 0 = none."""
    grid = np.zeros((len(NAMES), GRID, GRID), dtype=np.int64)
    for thing in scene:
        values = (thing.colour, thing.shape, thing.size, thing.place)
        for index, (names, value) in enumerate(zip(NAMES.values(), values, strict=True)):
            grid[index, thing.row, thing.column] = 1 + names.index(value)
    return grid


def picture_batches(
    rng: np.random.Generator, size: int, parts: bool = False
) -> Iterator[tuple[Tensor, Tensor, list[Scene]]]:
    """Yield pictures (size, 3, 384, 384) in bytes, labels (size, 4, 27, 27) and scenes without end.

    Args:
        parts: each picture is a boxed object of a scene, enlarged as the product enlarges a box.
    """
    while True:
        drawn = [_draw_part(rng) if parts else _draw_scene(rng) for _ in range(size)]
        pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in drawn])).permute(0, 3, 1, 2)
        scenes = [scene for _, scene in drawn]
        yield pictures, torch.from_numpy(np.stack([label_grid(scene) for scene in scenes])), scenes


def _draw_scene(rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    scene = random_scene(rng)
    return draw(scene, rng), scene


def _draw_part(rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """Draw a scene and cut out one object with the filter of SigLIP's image processor."""
    picture, scene = _draw_scene(rng)
    thing = scene[int(rng.integers(len(scene)))]
    box = object_box(thing, rng)
    left, top, right, bottom = map(int, box)
    part = picture.crop((left, top, right, bottom)).resize(picture.size, Image.Resampling.BICUBIC)
    return part, (in_its_part(thing, box),)


def _cut_cells(pictures: Tensor, labels: Tensor, scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out the occupied cells: pictures (C, 3, 126, 126), labels (C, 4, 81), places (C, 81)."""
    grid = torch.arange(GRID * GRID).view(GRID, GRID)
    cut_pictures, cut_labels, cut_places = [], [], []
    for index, scene in enumerate(scenes):
        for thing in scene:
            top, left = (CELL_PATCHES * part for part in divmod(thing.cell, 3))
            rows, columns = slice(top, top + CELL_PATCHES), slice(left, left + CELL_PATCHES)
            y, x = top * PATCH_PX, left * PATCH_PX
            side = CELL_PATCHES * PATCH_PX
            cut_pictures.append(pictures[index, :, y : y + side, x : x + side])
            cut_labels.append(labels[index, :, rows, columns].flatten(1))
            cut_places.append(grid[rows, columns].flatten())
    return torch.stack(cut_pictures), torch.stack(cut_labels), torch.stack(cut_places)


def _loss(reader: PatchReader, hidden: Tensor, labels: Tensor) -> Tensor:
    """Loss of hidden (B, N, D) with labels (B, 4, N). The last term makes the "none" patches similar."""
    is_object = labels[:, 0] > 0  # (B, N)
    weights = torch.where(is_object, 1.0, NONE_WEIGHT) / is_object.sum()
    loss = hidden.new_zeros(())
    for index, head in enumerate(reader.heads.values()):
        logits = head(hidden).float()  # (B, N, classes)
        losses = cross_entropy(logits.flatten(0, 1), labels[:, index].flatten(), reduction="none")
        loss = loss + (losses * weights.flatten()).sum()
    return loss + 0.1 * hidden[~is_object].float().var(dim=0).mean()


@torch.inference_mode()
def score(reader: PatchReader, seed: int, pictures: int, parts: bool = False) -> dict[str, float]:
    """Share of objects with a correct centre patch, per attribute and in all; false alarms per picture."""
    right = dict.fromkeys([*NAMES, "all"], 0)
    objects = alarms = 0
    batches = picture_batches(np.random.default_rng(seed), 8, parts)
    for _ in range(pictures // 8):
        pixels, labels, _ = next(batches)
        hidden = reader.encoder(pixel_values=pixel_values(pixels)).last_hidden_state  # (B, 729, D)
        guesses = torch.stack([head(hidden).argmax(-1) for head in reader.heads.values()], dim=1)  # (B, 4, 729)
        labels = labels.flatten(2)
        is_object = labels[:, 0] > 0
        hits = (guesses == labels).transpose(1, 2)[is_object]  # (objects, 4)
        objects += len(hits)
        alarms += int(((guesses > 0).any(1) & ~is_object).sum())
        for index, name in enumerate(NAMES):
            right[name] += int(hits[:, index].sum())
        right["all"] += int(hits.all(1).sum())
    shares = {name: round(count / objects, 4) for name, count in right.items()}
    return shares | {"false alarms per picture": round(alarms / pictures, 4)}


def pretrain(folder: Path, steps: int, seed: int, log) -> dict[str, dict[str, float]]:
    """Train for `steps` batches and write the encoder to `folder`; return its scores on new pictures and parts.

    The unfinished encoder is also written every 500 steps, so an interrupted run leaves a usable file.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    reader = PatchReader()
    optimizers = make_optimizers(reader, reader.encoder.encoder.layers, peak=3e-3)
    cell_batches = picture_batches(rng, 16)
    whole_batches = {"pictures": picture_batches(rng, 5), "parts": picture_batches(rng, 5, parts=True)}
    every_place = torch.arange(GRID * GRID)[None]
    running = {"cells": 5.0, "pictures": 5.0, "parts": 5.0}
    for step in range(1, steps + 1):
        set_rate(optimizers, min(1.0, step / 50) * min(1.0, 1.7 * (1 - step / steps)))
        # Single cells of 81 patches cost a tenth of pictures of 729, so training covers more objects in the same time.
        kind = "cells" if step < CELL_STEPS or step % 2 else "pictures" if step % 4 else "parts"
        if kind == "cells":
            pictures, labels, places = _cut_cells(*next(cell_batches))
        else:
            pictures, labels, _ = next(whole_batches[kind])
            labels, places = labels.flatten(2), every_place
        loss = _loss(reader, reader(pixel_values(pictures), places), labels)
        loss.backward()
        take_step(optimizers, reader)
        running[kind] = 0.9 * running[kind] + 0.1 * loss.item()
        if step % 100 == 0:
            losses = ", ".join(f"{name} {value:.4f}" for name, value in running.items())
            log(f"encoder step {step}, processor time {time.process_time():.0f} s, loss {losses}")
        if step % 500 == 0:
            log(str([score(reader, seed + 1, 48, parts) for parts in (False, True)]))
            _store(reader.encoder, folder)
    reader.to(torch.bfloat16).float()  # the weights as they are stored
    _store(reader.encoder, folder)
    return {name: score(reader, seed + 1, 320, name == "parts") for name in ("pictures", "parts")}


def _store(encoder: SiglipVisionModel, folder: Path) -> None:
    copy.deepcopy(encoder).to(torch.bfloat16).save_pretrained(folder)
