"""timm's vision transformers: `forward_features` of timm's own model, strict loading, clear errors. Needs timm."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from tests.visual.test_processors import TIMM
from visual.encoder import load_encoder
from visual.transform import ImageTransform
from visual_plan import Grid

WEIGHTS = "model.safetensors"
# architecture: pixels, patch, rows in front
KINDS = {
    "eva02_tiny_patch14_224": (56, 14, 1),  # EVA-02, pretrained by masking: norm behind the average
    "eva02_base_patch14_448": (56, 14, 1),  # separate q, k, v and SwiGLU
    "eva02_base_patch16_clip_224": (64, 16, 1),  # EVA-CLIP
    "vit_small_patch14_reg4_dinov2": (56, 14, 5),
    "vit_base_patch16_siglip_224": (64, 16, 0),  # pooled by attention, no class token
}


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(timm, kind):
    torch.manual_seed(5)
    model = timm.create_model(kind, depth=2, embed_dim=24, num_heads=2, img_size=KINDS[kind][0], num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write(timm, folder, kind, edit=lambda tensors: tensors):
    """As timm writes it for the hub."""
    model = build(timm, kind)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return model


@pytest.mark.parametrize("drop", ["none", "first", "leading"])
@torch.no_grad()
def test_output_is_forward_features(timm, tmp_path, kind, drop):
    model = write(timm, tmp_path, kind)
    pixels_of_edge, patch, leading = KINDS[kind]
    tower = load_encoder(tmp_path, torch.float32, drop)
    dropped = {"none": 0, "first": 1, "leading": leading}[drop]
    assert (tower.leading, tower.width, tower.size) == (leading, 24, (pixels_of_edge, pixels_of_edge))
    assert tower.grid == Grid(pixels_of_edge // patch, pixels_of_edge // patch, leading - dropped)
    pixels = torch.randn(2, 3, *tower.size)
    # float32 in the same order of operations; 1e-5 leaves room for another choice of kernel
    torch.testing.assert_close(tower(pixels), model.forward_features(pixels)[:, dropped:], rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(part.training for part in tower.modules())
    assert ImageTransform.from_folder(tmp_path).size == tower.size


@torch.no_grad()
def test_bfloat16(timm, tmp_path, kind):
    write(timm, tmp_path, kind)
    tower = load_encoder(tmp_path, torch.bfloat16)
    assert tower.dtype == torch.bfloat16
    assert tower(torch.randn(1, 3, *tower.size).bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_file_of_a_model_without_classifier(timm, tmp_path):
    kind = "eva02_base_patch16_clip_224"
    model = build(timm, kind)
    model.reset_classifier(0)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_encoder(tmp_path, torch.float32, "none")(pixels), model.forward_features(pixels))


def changed(name, tensor):
    return lambda tensors: {key: part for key, part in (tensors | {name: tensor}).items() if part is not None}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.0.norm1.bias", None, r"tensors missing: blocks\.0\.norm1\.bias$"),
        ("header.weight", torch.zeros(2), r"tensors left over: header\.weight$"),
        (
            "patch_embed.proj.bias",
            torch.zeros(23),
            r"wrong shape: patch_embed\.proj\.bias \[23\] instead of \[24\]$",
        ),
    ],
)
def test_strict(timm, tmp_path, kind, name, tensor, message):
    write(timm, tmp_path, kind, changed(name, tensor))
    with pytest.raises(UserError, match=rf"'visual.path': .*{message}"):
        load_encoder(tmp_path, torch.float32)


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "eva99_tiny"}, "knows no 'eva99_tiny': install a newer timm"),
        ({"architecture": "resnet10t", "model_args": {}}, "'resnet10t' in .* is not a plain vision transformer"),
        ({"model_args": {}}, "config.json in .* makes pictures of 56×56 px, its architecture .* takes 224×224"),
    ],
)
def test_wrong_config(timm, tmp_path, values, message):
    write(timm, tmp_path, "eva02_tiny_patch14_224")
    set_config(tmp_path, **values)
    with pytest.raises(UserError, match=f"'visual.path': .*{message}"):
        load_encoder(tmp_path, torch.float32)


def write_config(folder):
    content = {"architecture": "eva02_tiny_patch14_224", "num_classes": 0, "pretrained_cfg": TIMM}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def test_other_weights(tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"has no model\.safetensors, the only form in which timm's models are read"):
        load_encoder(tmp_path, torch.float32)


def test_timm_is_not_installed(tmp_path, monkeypatch):
    write_config(tmp_path)
    save_file({"cls_token": torch.zeros(1)}, tmp_path / WEIGHTS)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="is a model of timm, which cannot be imported .*: run `pip install timm`"):
        load_encoder(tmp_path, torch.float32)
