"""Photos of several shapes in tiles: training, feature cache, packing, resuming, and what the estimate measures."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from errors import UserError
from tests.tiny import IMAGE_SIZE, tiny_config
from tests.training.runs import lines, same
from training.batches import make_loader
from training.data import build_datasets, read_split
from training.dry_run import describe_run
from training.loop import Trainer

TILES = 4
# (width, height) in crops of a photo → its crops, the whole photo among them
SHAPES = [((0.7, 0.9), 1), ((2, 1), 3), ((1, 3), 4), ((2, 2), 5), ((1, 1), 1), ((4, 1), 5)]
TAG = "<|extra_0|>"


@pytest.fixture(scope="module")
def shapes(workshop, tmp_path_factory):
    """A folder with one photo of each shape, gradients of colour, and three questions on each."""
    folder = tmp_path_factory.mktemp("shapes")
    image_map, captions = {}, {}
    for ID, ((width, height), _) in enumerate(SHAPES):
        size = (round(width * IMAGE_SIZE), round(height * IMAGE_SIZE))
        file = folder / f"{ID}.png"
        ramps = [Image.linear_gradient("L").rotate(90 * turn + 10 * ID).resize(size) for turn in range(3)]
        Image.merge("RGB", ramps).save(file)
        image_map[f"photos/{ID}.png"] = {"ID": ID, "image_file": file.name, "path": str(file)}
        entries = [{"source": "tiny", "q": f"{TAG}\nQuestion {n}?", "a": [f"answer {n}"]} for n in range(3)]
        captions[str(ID)] = entries
    # two photos of unlike sizes in a dialogue
    captions["2"].append({"source": "tiny", "q": f"{TAG}{TAG}\nSame?", "a": ["no"], "images": [2, 3]})
    (folder / "image_map.json").write_text(json.dumps(image_map))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def configure(workshop, shapes, tmp_path):
    """`configure(folder, data={…}, **train)`: a run with tiles."""

    def build(folder="run", data=None, dropout=0.2, visual=None, captions=None, **train):
        files = {name: str(shapes / f"{name}.json") for name in ("image_map", "captions")}
        settings = {"output_dir": str(tmp_path / folder), "save_steps": 2, "log_steps": 1, "trackers": []}
        cache = {"feature_cache": str(tmp_path / "features")}
        return tiny_config(
            workshop,
            data=files | cache | (data or {}),
            visual={"path": str(workshop / "siglip"), "tiles": TILES} | (visual or {}),
            llm={"path": str(workshop / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": dropout}},
            train=settings | train,
        ).model_copy(update={"model_root": str(workshop)})

    return build


def batches(trainer, dataset, size):
    order = list(range(len(dataset)))
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    return list(make_loader(dataset, cut, 0, trainer.accelerator.device))


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def loss_and_gradients(trainer, size):
    model = trainer.model.train()
    model.zero_grad()
    losses = [model.loss(batch, 1) for batch in batches(trainer, trainer.train_set, size)]
    total = sum(losses)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trains_validates_and_resumes(configure, shapes, tmp_path):
    settings = {"data": {"val_fraction": 0.5}, "eval_steps": 2, "max_questions": 2}
    trainer = Trainer(configure(**settings))
    photos = trainer.train_set.photos
    assert [trainer.train_set.plan(ID).crops for ID in range(len(photos))] == [crops for _, crops in SHAPES]
    whole = trainer.run()
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged if "val_loss" in line] == [2, 4]
    assert all(line["val_loss"] > 0 for line in logged if "val_loss" in line)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    assert same(Trainer(configure("part", **settings), resume="auto").run(), whole)


@pytest.mark.parametrize("vision", ["frozen", "full"])
def test_packed_equals_unpacked(configure, vision):
    parts = {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}, "vision": {"mode": vision}}
    found = []
    for packing, size in ((False, 1), (True, 1), (True, 4)):
        trainer = Trainer(configure(dropout=0.0, pack_questions=packing, parts=parts))
        randomise(trainer.model)
        found.append(loss_and_gradients(trainer, size))
    (loss, gradients), *packed = found
    for packed_loss, packed_gradients in packed:
        assert packed_loss == pytest.approx(loss, rel=2e-6)
        for name, gradient in gradients.items():
            # relative in norm: float32 sums in another order; key biases have none but rounding
            error = (packed_gradients[name] - gradient).norm()
            assert error < 5e-5 * gradient.norm() + 1e-4 * ("k_proj.bias" in name), name


def test_cached_features_equal_the_pixels(configure):
    trainer = Trainer(configure(dropout=0.0))
    model, config = trainer.model, configure(data={"cache_features": True})
    randomise(model)
    cached_set, _ = build_datasets(config, model, *read_split(config))
    for pixels, cached in zip(batches(trainer, trainer.train_set, 3), batches(trainer, cached_set, 3), strict=True):
        assert cached.pixel_values is None
        assert torch.equal(cached.crop_index, pixels.crop_index)
        features = model.encode_image(pixels.pixel_values).to(torch.bfloat16)
        # the cache encodes other photos together, which changes the last bit of float32 sums, and that may cross one
        # step of bf16 (2 ** -8)
        torch.testing.assert_close(cached.image_features, features, rtol=2**-7, atol=1e-5)
        expected = model.loss(dataclasses.replace(pixels, pixel_values=None, image_features=cached.image_features))
        assert torch.equal(model.loss(cached), expected)
        assert model.loss(cached).item() == pytest.approx(model.loss(pixels).item(), rel=1e-2)


def test_a_cache_of_unlike_photos_is_checked(configure, shapes, capsys):
    config = configure(data={"cache_features": True})
    trainer = Trainer(config)
    trainer.run()
    loader = trainer.train_set.load_photo
    photos = list(trainer.train_set.photos)
    assert [len(loader(photo)) for photo in photos] == [crops for _, crops in SHAPES]
    sound = loader.file.read_bytes()
    content = bytearray(sound)
    first = sum(crops for _, crops in SHAPES[:3])  # crops before those of photo 3
    content[(first + 4) * loader.crop_bytes + 3] ^= 1  # in its last crop
    loader.file.write_bytes(content)
    assert len(loader(photos[2])) == SHAPES[2][1]
    with pytest.raises(UserError, match=r"the features of .*3\.png are damaged"):
        loader(photos[3])
    Trainer(configure("again", data={"cache_features": True}))
    assert "photo 3 do not match their checksum" in capsys.readouterr().err
    assert loader.file.read_bytes() == sound
    other = Trainer(configure("fewer", data={"cache_features": True}, visual={"tiles": 2}))
    assert other.train_set.load_photo.file != loader.file


def test_the_estimate_measures_the_largest_photo(configure, shapes, tmp_path):
    """Among many smaller photos with more text."""
    captions = {"0": [], "3": [{"source": "tiny", "q": f"{TAG}?", "a": ["x"]}]}
    captions["0"] = [
        {"source": "tiny", "q": f"{TAG}\nQuestion {n} of many?", "a": ["a long answer"]} for n in range(40)
    ]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    config = configure(data={"captions": str(tmp_path / "captions.json")}, pack_questions=False)
    run = Trainer(config, dry_run=True)
    lengths = [len(run.train_set.tokens(index).input_ids) for index in range(len(run.train_set))]
    assert lengths.count(max(lengths)) == 1
    assert run.estimate.longest == max(lengths)
    assert len(run.estimate.sample.photos[3]) == 5
    assert f"longest {max(lengths)}; " in describe_run(run)


def test_a_dry_run_leaves_out_a_photo_whose_size_cannot_be_read(configure, shapes, tmp_path):
    """Training replaces the sample."""
    image_map = json.loads((shapes / "image_map.json").read_text())
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    image_map["photos/3.png"]["path"] = str(tmp_path / "cut.png")
    (tmp_path / "image_map.json").write_text(json.dumps(image_map))
    run = Trainer(configure(data={"image_map": str(tmp_path / "image_map.json")}), dry_run=True)
    unread = [index for index in range(len(run.train_set)) if run.train_set.length(index) == 0]
    assert unread
    assert f"(of {len(run.train_set) - len(unread)} samples)" in describe_run(run)
