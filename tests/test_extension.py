"""A new tower, projector or trained part is one class or function and one line of a table; nothing else changes.

The three toys are registered here alone; a run trains, validates, saves, resumes and answers with them.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from answering.answer import Answerer
from errors import UserError
from model import parts, projector
from model.checkpoint import load_checkpoint
from tests.tiny import tiny_config
from training.feature_cache import cached_features
from training.loop import Trainer
from visual import encoder
from visual.tower import Tower

TOY_FILE = "toy_adapter.safetensors"  # no LoRA, whatever its name says
EDGE, PATCH, WIDTH = 24, 8, 10


class ToyTower(Tower):
    """A linear layer on each patch, behind one row that is the same for every picture."""

    leading = 1
    width = WIDTH
    size = (EDGE, EDGE)
    patch_size = (PATCH, PATCH)

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)

    @classmethod
    def load(cls, folder, dtype):
        tower = cls()
        result = tower.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        info = {"missing_keys": result.missing_keys, "unexpected_keys": result.unexpected_keys, "mismatched_keys": []}
        return tower.to(dtype), info

    def encode(self, pixels):
        squares = nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (C, patches, 3 · PATCH²)
        return torch.cat([self.first.expand(len(pixels), -1, -1), self.patches(squares)], dim=1)


class ToyProjector(projector.FeatureProjector):
    """Mean of the first row and the patches: two tokens of each crop."""

    def __init__(self, settings, grid, width, out_width):
        super().__init__(settings, grid, width, out_width)
        self.layer = nn.Linear(width, out_width)

    def tokens(self, grid):
        return 2

    def forward(self, rows, grid):
        rows = self.cast(rows, grid)
        return self.layer(torch.stack([rows[:, 0], rows[:, grid.extra :].mean(1)], dim=1))

    def operations(self, grid, trained, passes_on=False):
        return 2 * (2 + 2 * trained + 2 * passes_on) * self.layer.weight.numel()


def toy_parts(model, settings):
    """The language model's last norm, and one row that is added to the last hidden states."""
    norm = model.LLM.get_base_model().model.norm if hasattr(model.LLM, "get_base_model") else model.LLM.model.norm
    norm.shift = nn.Parameter(torch.zeros_like(norm.weight))
    norm.register_forward_hook(lambda norm, _, states: states + norm.shift.to(states.dtype))
    return [parts.Part("toy", settings.lr, {"weight": norm.weight, "shift": norm.shift}, TOY_FILE)]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(encoder.TOWERS, "toy", ToyTower)
    monkeypatch.setitem(projector.PROJECTORS, "toy", ToyProjector)
    monkeypatch.setitem(parts.PARTS, "toy", toy_parts)


@pytest.fixture(scope="module")
def toys(workshop):
    """The workshop with a checkpoint folder of the toy tower."""
    folder = workshop / "toy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": EDGE, "width": EDGE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    save_file(
        {name: torch.randn_like(tensor) for name, tensor in ToyTower().state_dict().items()},
        folder / "model.safetensors",
    )
    return workshop


def configured(toys, output, vision=None, data=None, **train):
    settings = {
        "output_dir": str(output),
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "log_steps": 1,
        "trackers": [],
    }
    rates = {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}, "toy": {"lr": 3e-2}, "vision": vision or {}}
    return tiny_config(
        toys,
        data={"val_fraction": 0.4} | (data or {}),
        visual={"path": str(toys / "toy"), "drop": "none"},
        llm={"path": str(toys / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
        projector={"kind": "toy"},
        train=settings | {"parts": rates} | train,
    ).model_copy(update={"model_root": str(toys)})


VISION = {
    "frozen": ({}, [None]),
    "lora": ({"mode": "lora", "lr": 1e-2}, ["vision_adapter/adapter_model.safetensors"]),
    "full": ({"mode": "full", "lr": 1e-2}, ["vision.safetensors"]),
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.usefixtures("registered")
def test_toys_train_validate_resume_and_answer(toys, tmp_path, vision):
    settings, (vision_file,) = VISION[vision]
    trainer = Trainer(configured(toys, tmp_path / "run", settings))
    assert isinstance(trainer.model.encoder, ToyTower)
    assert isinstance(trainer.model.feature_proj, ToyProjector)
    assert trainer.model.processor.chat.plan.tokens == 2
    folder = trainer.run()
    weights = load_file(folder / TOY_FILE)
    assert set(weights) == {"weight", "shift"}
    assert weights["shift"].abs().min() > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    assert 0 < lines[0]["toy_lr"] <= 3e-2
    assert vision_file is None or (folder / vision_file).is_file()

    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = Trainer(configured(toys, tmp_path / "part", settings), resume="auto").run()
    for file in folder.rglob("*.safetensors"):
        expected, actual = load_file(file), load_file(resumed / file.relative_to(folder))
        assert all(torch.equal(actual[name], expected[name]) for name in expected), file

    loaded = load_checkpoint(folder, overrides={"model_root": str(toys)})
    shift = loaded.language_model.model.norm.shift
    assert torch.equal(shift, weights["shift"])
    photo = trainer.train_set.photos[0].path
    answer = Answerer(loaded).answer(photo, "Which colour?")
    assert answer == Answerer(trainer.model.eval()).answer(photo, "Which colour?")


@pytest.mark.usefixtures("registered")
def test_toys_take_every_setting_that_the_others_take(toys, tmp_path):
    """Activation checkpointing, tiles, the estimate behind `auto`, and the feature cache."""
    settings = {"gradient_checkpointing": "on", "micro_batch": "auto", "samples_per_step": 2, "max_steps": 1}
    Trainer(configured(toys, tmp_path / "trained", VISION["full"][0], **settings)).run()
    config = configured(toys, tmp_path / "cached", data={"cache_features": True, "feature_cache": str(tmp_path / "c")})
    config.visual.tiles = 4
    trainer = Trainer(config)
    trainer.run()
    photo = trainer.train_set.photos[0]
    loader = cached_features(trainer.model, [photo], config)
    crops = trainer.model.processor.plan(60, 50).crops
    assert crops > 1
    assert loader(photo).shape == (crops, 1 + (EDGE // PATCH) ** 2, WIDTH)


def test_a_part_that_nobody_registered_is_one_sentence(toys, tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "toys", toy_parts)
    config = tiny_config(toys, train={"parts": {"toy": {"lr": 1e-2}}})
    with pytest.raises(
        UserError, match=r"^'train.parts.toy' is not a part that can be trained, did you mean 'toys'\?$"
    ):
        Trainer(config)
