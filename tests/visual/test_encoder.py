"""SigLIP and CLIP towers load from every layout they are published in, strictly, and give transformers' own numbers."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, SiglipModel, SiglipVisionModel

from tests.tiny import IMAGE_SIZE, write_clip, write_siglip
from visual.encoder import load_encoder

TOWERS = {"siglip": (write_siglip, SiglipModel, SiglipVisionModel), "clip": (write_clip, CLIPModel, CLIPVisionModel)}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=TOWERS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    return TOWERS[kind][0](tmp_path / kind)


def change(folder, edit):
    """Rewrite the weights after `edit(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


@torch.no_grad()
def reference(folder, kind, pixels):
    return TOWERS[kind][1].from_pretrained(folder).eval().vision_model(pixels).last_hidden_state


@pytest.mark.parametrize(
    ("image_size", "patch_size", "patches"),
    [(224, 14, 256), (336, 14, 576), (384, 14, 729), (224, 16, 196), (256, 16, 256), (384, 16, 576), (512, 16, 1024)],
)
@torch.no_grad()
def test_output_is_the_last_hidden_state(kind, tmp_path, image_size, patch_size, patches):
    folder = TOWERS[kind][0](tmp_path / kind, image_size, patch_size)
    encoder = load_encoder(folder, torch.float32, "none")
    pixels = torch.randn(1, 3, image_size, image_size)
    tokens = encoder(pixels)
    assert encoder.grid.rows == patches + (kind == "clip")
    assert (encoder.leading, encoder.width) == (int(kind == "clip"), 24)
    assert tokens.shape == (1, encoder.grid.rows, 24)
    torch.testing.assert_close(tokens, reference(folder, kind, pixels))


@torch.no_grad()
def test_the_vision_tower_alone(kind, folder, tmp_path):
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = load_encoder(folder, torch.float32)(pixels)
    TOWERS[kind][2].from_pretrained(folder).save_pretrained(tmp_path / "tower")
    assert torch.equal(load_encoder(tmp_path / "tower", torch.float32)(pixels), expected)
    # as other tools write it, without the prefix
    change(tmp_path / "tower", lambda tensors: rename(tensors, lambda name: name.removeprefix("vision_model.")))
    assert torch.equal(load_encoder(tmp_path / "tower", torch.float32)(pixels), expected)


def rename(tensors, new_name):
    renamed = {new_name(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@torch.no_grad()
def test_config_as_published_leaves_defaults_out(tmp_path):
    """google/siglip-so400m-patch14-384 names seven keys of its vision tower, google/siglip-base-patch16-224 one."""
    folder = write_siglip(tmp_path)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = load_encoder(folder, torch.float32)(pixels)
    named = ["hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size"]
    vision = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]
    published = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"},
        "torch_dtype": "float32",
        "vision_config": {key: vision[key] for key in named} | {"model_type": "siglip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    assert torch.equal(load_encoder(folder, torch.float32)(pixels), expected)


@torch.no_grad()
def test_first_row_of_clip_is_the_class_token(tmp_path):
    folder = write_clip(tmp_path)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    encoder = load_encoder(folder, torch.float32, "none")
    pooled = CLIPVisionModel.from_pretrained(folder).eval()(pixels).pooler_output
    torch.testing.assert_close(encoder.post_layernorm(encoder(pixels)[:, 0]), pooled)


@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_bin_files(folder, sharded):
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = load_encoder(folder, torch.float32)(pixels)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if sharded:
        shards = {f"pytorch_model-0000{part + 1}-of-00002.bin": sorted(tensors)[part::2] for part in range(2)}
        for file, names in shards.items():
            torch.save({name: tensors[name] for name in names}, folder / file)
        table = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table), encoding="utf-8")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_encoder(folder, torch.float32)(pixels), expected)


def test_frozen_and_in_the_asked_dtype(folder):
    encoder = load_encoder(folder, torch.bfloat16)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


def test_buffer_of_older_files_is_known(folder):
    change(folder, lambda tensors: tensors.update({"vision_model.embeddings.position_ids": torch.arange(17)[None]}))
    load_encoder(folder, torch.float32)


@pytest.mark.parametrize(
    "name", ["vision_model.head.extra", "text_modelling.weight", "my.logit_scale", "vision_model.pooler.weight"]
)
def test_unknown_tensor(folder, name):
    change(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(ValueError, match=rf"'visual.path': .* tensors left over: {re.escape(name)}$"):
        load_encoder(folder, torch.float32)


def test_missing_tensor(folder):
    change(folder, lambda tensors: tensors.pop("vision_model.encoder.layers.1.mlp.fc1.bias"))
    with pytest.raises(ValueError, match=r"'visual.path': .* tensors missing: encoder\.layers\.1\.mlp\.fc1\.bias$"):
        load_encoder(folder, torch.float32)


def test_tensor_of_the_wrong_shape(folder):
    name = "vision_model.post_layernorm.bias"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(23)}))
    with pytest.raises(ValueError, match=r"of the wrong shape: post_layernorm\.bias \[23\] instead of \[24\]$"):
        load_encoder(folder, torch.float32)


def test_many_wrong_tensors_are_counted(folder):
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_model.encoder" in name])
    with pytest.raises(ValueError, match=r"tensors missing: encoder\.layers\.0.* and 24 more$"):
        load_encoder(folder, torch.float32)


@pytest.mark.parametrize("model_type", ["qwen2", "siglip_text_model", "clipseg", None])
def test_other_kinds_of_model(folder, model_type):
    set_config(folder, model_type=model_type)
    message = f"is of type '{model_type}'; supported: siglip, siglip_vision_model, clip, clip_vision_model"
    with pytest.raises(ValueError, match=message):
        load_encoder(folder, torch.float32)


def test_naflex(folder):
    set_config(folder, model_type="siglip2")
    with pytest.raises(ValueError, match="is a NaFlex SigLIP 2, .* use one of fixed resolution"):
        load_encoder(folder, torch.float32)


def test_pictures_of_another_size(folder):
    with pytest.raises(ValueError, match="28.*56"):
        load_encoder(folder, torch.float32)(torch.zeros(1, 3, 28, 28))


def peak_memory_mb() -> float:
    """Largest resident memory since the last reset."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def test_the_text_tower_is_never_in_memory(folder):
    """Its embedding is blown up to 400 MB (a hole in the file, so that it costs no disk); loading stays far below."""
    with open(folder / WEIGHTS, "rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        data = stream.read()
    name = "text_model.embeddings.token_embedding.weight"
    size = 400 << 20
    header[name] |= {"shape": [size // 64, 16], "data_offsets": [len(data), len(data) + size]}
    # safetensors allows no gap, so the place the embedding had gets a name of its own
    used = sorted(tuple(tensor["data_offsets"]) for key, tensor in header.items() if key != "__metadata__")
    gaps = [(end, start) for (_, end), (start, _) in zip([(0, 0), *used], used, strict=False) if end != start]
    for number, (start, end) in enumerate(gaps):
        header[f"text_model.gap{number}"] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text + data)
        stream.truncate(8 + len(text) + len(data) + size)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    except OSError:
        pytest.skip("no way to reset the peak of resident memory here")
    before = peak_memory_mb()
    load_encoder(folder, torch.bfloat16)  # another type than the file's, so that what is read is copied
    assert peak_memory_mb() - before < 40
    load_file(folder / WEIGHTS)[name].to(torch.bfloat16)
    assert peak_memory_mb() - before > 400  # this is what the meter shows of a tower that is read
