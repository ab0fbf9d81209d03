"""A tower knows its rows: what it drops, its grid, and that one entry of a table is all that a new tower needs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny import IMAGE_SIZE, write_clip, write_siglip
from visual.encoder import TOWERS, load_encoder
from visual.tower import Tower
from visual_plan import Grid

GRIDS = {
    ("siglip", "none"): Grid(4, 4, 0),
    ("siglip", "first"): Grid(4, 4, -1),
    ("siglip", "leading"): Grid(4, 4, 0),
    ("clip", "none"): Grid(4, 4, 1),
    ("clip", "first"): Grid(4, 4, 0),
    ("clip", "leading"): Grid(4, 4, 0),
    ("toy", "none"): Grid(2, 3, 2),
    ("toy", "first"): Grid(2, 3, 1),
    ("toy", "leading"): Grid(2, 3, 0),
}


class Toy(Tower):
    """Two rows in front of the mean colours of 2 × 3 patches."""

    leading, width, size, patch_size = 2, 3, (8, 12), (4, 4)

    def __init__(self):
        super().__init__()
        self.front = nn.Parameter(torch.zeros(2, 3))

    @classmethod
    def load(cls, folder, dtype):
        tensors = load_file(folder / "model.safetensors")
        tower = cls()
        info = {"missing_keys": {"front"} - tensors.keys(), "unexpected_keys": tensors.keys() - {"front"}}
        if not any(info.values()):
            tower.load_state_dict(tensors)
        return tower.to(dtype), info | {"mismatched_keys": set()}

    def encode(self, pixels):
        patches = nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        return torch.cat([self.front.expand(len(pixels), 2, 3), patches], dim=1)


def write_toy(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}), encoding="utf-8")
    save_file({"front": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def toy_in_the_table(monkeypatch):
    monkeypatch.setitem(TOWERS, "toy", Toy)


def write(kind, folder):
    return {"siglip": write_siglip, "clip": write_clip, "toy": write_toy}[kind](folder / kind)


@pytest.mark.parametrize(("kind", "drop"), GRIDS)
@torch.no_grad()
def test_rows_are_those_of_the_grid(tmp_path, kind, drop):
    tower = load_encoder(write(kind, tmp_path), torch.float32, drop)
    assert tower.grid == GRIDS[kind, drop]
    pixels = torch.randn(2, 3, *tower.size)
    rows = tower(pixels)
    every_row = tower.encode(pixels)
    assert rows.shape == (2, tower.grid.rows, tower.width)
    assert every_row.shape[1] == tower.all_rows == tower.leading + tower.grid.height * tower.grid.width
    assert torch.equal(rows, every_row[:, tower.all_rows - tower.grid.rows :])


def test_first_is_dropped_unless_said_otherwise(tmp_path):
    assert load_encoder(write("siglip", tmp_path), torch.float32).grid == Grid(4, 4, -1)


@torch.no_grad()
def test_tower_of_one_entry(tmp_path):
    tower = load_encoder(write("toy", tmp_path), torch.bfloat16, "leading")
    assert tower.dtype == torch.bfloat16
    assert not tower.training
    assert not tower.front.requires_grad
    pixels = torch.zeros(1, 3, 8, 12, dtype=torch.bfloat16)
    pixels[:, 1, 4:, 8:] = 7
    assert tower(pixels)[0].tolist() == [[0, 0, 0]] * 5 + [[0, 7, 0]]


def test_tower_of_one_entry_loads_strictly(tmp_path):
    folder = write("toy", tmp_path)
    save_file({"back": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="'visual.path': .* tensors missing: front; left over: back$"):
        load_encoder(folder, torch.float32)


@pytest.mark.parametrize("kind", ["siglip", "clip", "toy"])
def test_pictures_of_another_size(tmp_path, kind):
    tower = load_encoder(write(kind, tmp_path), torch.float32)
    height, width = tower.size
    with pytest.raises(ValueError, match=f"^pictures are {height}×28, the encoder takes {height}×{width} px$"):
        tower(torch.zeros(1, 3, height, 28))


def test_unknown_drop(tmp_path):
    with pytest.raises(ValueError, match="drop is 'last', not one of first, leading, none"):
        load_encoder(write("toy", tmp_path), torch.float32, "last")


def test_sizes_of_the_tiny_towers(tmp_path):
    assert load_encoder(write("clip", tmp_path), torch.float32).size == (IMAGE_SIZE, IMAGE_SIZE)
