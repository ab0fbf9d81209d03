"""ViT, DINOv2 and DINOv3 give transformers' own last hidden state, from every published layout and older names too."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from paths import REPO_ROOT
from visual.encoder import load_encoder
from visual.transform import ImageTransform, load_image
from visual_plan import Grid

COMMON = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = ViTConfig(**COMMON, intermediate_size=48, image_size=56, patch_size=14)
# positions for 6 × 6 patches, pictures of 4 × 4: as published, where it is 37 × 37 and 16 × 16
DINOV2 = {**COMMON, "mlp_ratio": 2, "image_size": 84, "patch_size": 14}
DINOV3 = {**COMMON, "intermediate_size": 48, "image_size": 56, "patch_size": 14, "num_register_tokens": 4}
# name: model with its head, config, the same without, class, name of the model in it, rows in front
KINDS = {
    "vit": (ViTForImageClassification, VIT, ViTModel, "vit", 1),
    "vit-masked": (ViTForMaskedImageModeling, VIT, ViTModel, "vit", 1),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**DINOV2), Dinov2Model, "dinov2", 1),
    "dinov2-giant": (
        Dinov2ForImageClassification, Dinov2Config(**DINOV2, use_swiglu_ffn=True), Dinov2Model, "dinov2", 1,
    ),
    "registers": (
        Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=4),
        Dinov2WithRegistersModel, "dinov2_with_registers", 5,
    ),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**DINOV3), DINOv3ViTModel, None, 5),
    "dinov3-gated": (DINOv3ViTModel, DINOv3ViTConfig(**DINOV3, use_gated_mlp=True), DINOv3ViTModel, None, 5),
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 56, "width": 56},
}
WEIGHTS = "model.safetensors"


def write(folder, kind, names=None):
    """A model with its head, random weights; `names` rewrites the tensors, which have the names of the classes."""
    torch.manual_seed(4)
    model = KINDS[kind][0](KINDS[kind][1])
    with torch.no_grad():  # registers and the mask token start at 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if names is not None:
        tensors = names({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    return write(tmp_path / kind, kind)


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edited = edit(tensors)
    save_file(edited, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def reference(folder, kind, pixels):
    whole, _, _, name, _ = KINDS[kind]
    model = whole.from_pretrained(folder).eval()
    return (model if name is None else getattr(model, name))(pixels).last_hidden_state


@pytest.mark.parametrize("drop", ["none", "first", "leading"])
@torch.no_grad()
def test_output_is_the_last_hidden_state(kind, folder, drop):
    leading = KINDS[kind][4]
    encoder = load_encoder(folder, torch.float32, drop)
    dropped = {"none": 0, "first": 1, "leading": leading}[drop]
    assert (encoder.leading, encoder.width, encoder.size) == (leading, 24, (56, 56))
    assert encoder.grid == Grid(4, 4, leading - dropped)
    pixels = torch.randn(2, 3, 56, 56)
    # float32 in the same order of operations; 1e-5 leaves room for another choice of kernel
    torch.testing.assert_close(encoder(pixels), reference(folder, kind, pixels)[:, dropped:], rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(part.training for part in encoder.modules())
    assert load_encoder(folder, torch.bfloat16).dtype == torch.bfloat16


def test_nothing_is_printed_about_the_head(kind, folder, caplog, capfd):
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    caplog.clear()
    capfd.readouterr()
    load_encoder(folder, torch.float32)
    transformers_logging.enable_progress_bar()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity


@torch.no_grad()
def test_the_model_without_its_head(kind, folder, tmp_path):
    pixels = torch.randn(1, 3, 56, 56)
    expected = load_encoder(folder, torch.float32)(pixels)
    KINDS[kind][2].from_pretrained(folder).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    assert torch.equal(load_encoder(tmp_path / "bare", torch.float32)(pixels), expected)


# names of transformers 5 -> those in files of transformers 4
OLD_VIT = [
    (r"\blayers\.", "encoder.layer."),
    (r"attention\.([qkv])_proj", lambda found: f"attention.attention.{LONG[found[1]]}"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
LONG = {"q": "query", "k": "key", "v": "value"}
OLD_DINOV2 = [*OLD_VIT[1:3], (r"mlp\.down_proj", "mlp.weights_out")]
OLD_DINOV3 = [(r"^model\.layer\.", "layer.")]


def old_names(tensors, patterns):
    """With the gate and the other half of SwiGLU in one matrix, as DINOv2 holds them."""
    renamed = {}
    for name, tensor in tensors.items():
        if "mlp.gate_proj" in name and any("weights_out" in str(new) for _, new in patterns):
            both = torch.cat([tensor, tensors[name.replace("gate_proj", "up_proj")]])
            renamed[name.replace("gate_proj", "weights_in")] = both
            continue
        if "mlp.up_proj" in name and any("weights_out" in str(new) for _, new in patterns):
            continue
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


OLD_EXAMPLES = {
    "vit": "vit.encoder.layer.1.attention.attention.query.weight",
    "vit-masked": "vit.encoder.layer.1.output.dense.bias",
    "dinov2": "dinov2.encoder.layer.1.attention.attention.query.weight",
    "dinov2-giant": "dinov2.encoder.layer.1.mlp.weights_in.weight",
    "registers": "dinov2_with_registers.encoder.layer.1.attention.output.dense.weight",
    "dinov3": "layer.1.layer_scale1.lambda1",
    "dinov3-gated": "layer.1.mlp.gate_proj.weight",
}


@torch.no_grad()
def test_older_and_newer_names(kind, tmp_path):
    patterns = OLD_VIT if kind.startswith("vit") else OLD_DINOV3 if kind.startswith("dinov3") else OLD_DINOV2
    new = write(tmp_path / "new", kind, lambda tensors: tensors)
    if OLD_EXAMPLES[kind] in load_file(new / WEIGHTS):  # DINOv2 in transformers 5.17
        pytest.skip("this transformers has the older names itself")
    old = write(tmp_path / "old", kind, lambda tensors: old_names(tensors, patterns))
    assert OLD_EXAMPLES[kind] in load_file(old / WEIGHTS)
    pixels = torch.randn(1, 3, 56, 56)
    expected = load_encoder(new, torch.float32)(pixels)
    assert torch.equal(load_encoder(old, torch.float32)(pixels), expected)
    assert torch.equal(load_encoder(write(tmp_path / "saved", kind), torch.float32)(pixels), expected)


def test_unknown_tensor(folder):
    change(folder, lambda tensors: tensors | {"classifier.scale": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'visual.path': .* tensors left over: classifier\.scale$"):
        load_encoder(folder, torch.float32)


def test_missing_tensor(kind, tmp_path):
    wanted = re.compile(r"1\.attention\.(q_proj|attention\.query)\.bias$")

    def without(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if not wanted.search(name)}
        assert len(kept) == len(tensors) - 1
        return kept

    folder = write(tmp_path, kind, without)
    with pytest.raises(ValueError, match=r"'visual.path': .* tensors missing: [^ ]*1\.attention\.[a-z_.]+\.bias$"):
        load_encoder(folder, torch.float32)


def test_tensor_of_the_wrong_shape(kind, tmp_path):
    wanted = re.compile(r"1\.(norm1|layernorm_before)\.bias$")

    def cut(tensors):
        return {name: tensor[:23] if wanted.search(name) else tensor for name, tensor in tensors.items()}

    folder = write(tmp_path, kind, lambda tensors: {name: part.contiguous() for name, part in cut(tensors).items()})
    with pytest.raises(ValueError, match=r"of the wrong shape: [^ ]*1\.[a-z0-9_]+\.bias \[23\] instead of \[24\]$"):
        load_encoder(folder, torch.float32)


def test_dinov2_without_the_file_that_says_how_large_pictures_are(tmp_path):
    folder = write(tmp_path / "dinov2", "dinov2")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json not found"):
        load_encoder(folder, torch.float32)


@torch.no_grad()
def test_a_published_vit(samples_folder):
    """Its file has the names of transformers 4, and head and pooling layer are left over."""
    folder = Path(REPO_ROOT).parent / "shared" / "real" / "models" / "vit-tiny-patch16-224"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    encoder = load_encoder(folder, torch.float32, "none")
    assert encoder.grid == Grid(14, 14, 1)
    photo = load_image(sorted(samples_folder.rglob("*.jpg"))[0])
    pixels = ImageTransform.from_folder(folder)(photo).unsqueeze(0)
    rows = encoder(pixels)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(rows, model.vit(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)
    # and the classes that its own head sees are those of the whole model
    torch.testing.assert_close(model.classifier(rows[:, 0]), model(pixels).logits, rtol=1e-5, atol=1e-5)
