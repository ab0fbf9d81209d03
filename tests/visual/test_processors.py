"""Processors that transformers has no Pillow class for equal its torchvision class (DINOv3) and timm's transform."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from errors import UserError
from visual.transform import ImageTransform

SHAPES = [(37, 61), (61, 37), (224, 224), (1, 1), (700, 301), (300, 701)]  # (height, width)
NOTHING = ["crop_size", "data_format", "device", "disable_grouping", "do_center_crop", "do_convert_rgb", "do_pad",
           "input_data_format", "pad_size", "return_tensors"]  # fmt: skip
DINOV3 = dict.fromkeys(NOTHING) | {
    "default_to_square": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}  # facebook/dinov3-vits16-pretrain-lvd1689m
TIMM = {
    "tag": "mim_in22k",
    "custom_load": False,
    "input_size": [3, 56, 56],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "num_classes": 0,
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def transform_of(folder, settings):
    if "input_size" in settings:
        content = {"architecture": "eva02_tiny_patch14_224", "num_classes": 0, "pretrained_cfg": settings}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return ImageTransform.from_folder(folder)


class TestDINOv3:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("resample", [2, 3])
    def test_equals_resizing_what_was_scaled(self, tmp_path, shape, resample):
        """The definition: divided by 255, resized with antialiasing in float, normalised."""
        settings = DINOV3 | {"resample": resample}
        pixels = torch.from_numpy(np.asarray(picture(*shape)) / np.float32(255)).permute(2, 0, 1)[None]
        mode = {2: "bilinear", 3: "bicubic"}[resample]
        resized = torch.nn.functional.interpolate(pixels, (224, 224), mode=mode, antialias=True)[0]
        mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        transform = transform_of(tmp_path, settings)
        assert transform.size == (224, 224)
        found = transform(picture(*shape))
        assert found.dtype == torch.float32
        # the last float32 digit of values up to 1, divided by 0.22; Pillow's 8 bit would be off by 1 / 255 / 0.22 / 2
        torch.testing.assert_close(found, (resized - mean) / std, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_transformers(self, tmp_path, shape):
        pytest.importorskip("torchvision")
        from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor

        found = transform_of(tmp_path, DINOV3)(picture(*shape))
        expected = DINOv3ViTImageProcessor.from_pretrained(tmp_path)(picture(*shape), return_tensors="pt")
        # scaling before resizing and after it differ in the last float32 digit
        torch.testing.assert_close(found, expected["pixel_values"][0], rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"resample": 1}, r"resample is 1, only \[2, 3\] are read"),
            ({"size": {"shortest_edge": 224}}, "gives photos no fixed height and width"),
        ],
    )
    def test_what_is_not_read(self, tmp_path, change, message):
        with pytest.raises(UserError, match=message):
            transform_of(tmp_path, DINOV3 | change)


class TestTimm:
    @pytest.mark.parametrize("shape", [*SHAPES, (63, 64), (64, 65), (101, 77)])
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"crop_pct": 1.0},
            {"crop_pct": 0.875, "interpolation": "bilinear"},
            {"crop_mode": "squash", "crop_pct": 1.0},
            {"crop_mode": "squash", "crop_pct": 0.95, "input_size": [3, 42, 70]},
        ],
    )
    def test_equals_timm(self, tmp_path, shape, change):
        pytest.importorskip("timm")
        from timm.data import create_transform, resolve_data_config

        found = transform_of(tmp_path, TIMM | change)(picture(*shape))
        expected = create_transform(**resolve_data_config(pretrained_cfg=TIMM | change))(picture(*shape))
        # the same 8-bit pixels; scaling and normalising round differently in the last float32 digit, one level is 0.014
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("height", "top"), [(62, 0), (63, 0), (64, 1), (65, 2), (66, 2), (67, 2), (68, 3)])
    def test_half_a_margin_is_rounded_to_even(self, tmp_path, height, top):
        rows = np.repeat(np.arange(height, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(62, axis=1)
        settings = TIMM | {"input_size": [3, 62, 62], "crop_pct": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3}
        pixels = transform_of(tmp_path, settings)(Image.fromarray(rows)) * 255
        assert pixels[0, :, 0].round().tolist() == list(range(top, top + 62))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"crop_mode": "border"}, "crop_mode 'border' with 56×56 px is not read"),
            ({"input_size": [3, 42, 70]}, "crop_mode 'center' with 42×70 px is not read"),
            ({"interpolation": "random"}, "interpolation is 'random', only nearest, "),
        ],
    )
    def test_what_is_not_read(self, tmp_path, change, message):
        with pytest.raises(UserError, match=rf"config\.json: {message}"):
            transform_of(tmp_path, TIMM | change)

    def test_setting_is_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"config\.json: .*'crop_pct'"):
            transform_of(tmp_path, {name: value for name, value in TIMM.items() if name != "crop_pct"})


def test_fingerprint_tells_them_from_transformers_own(tmp_path):
    """With the same settings, transformers' class of ViT rounds to 8 bit, and CLIP's rounds half a margin down."""
    dinov3 = transform_of(tmp_path, DINOV3).fingerprint()
    assert transform_of(tmp_path, DINOV3 | {"image_processor_type": "ViTImageProcessor"}).fingerprint() != dinov3
    (tmp_path / "preprocessor_config.json").unlink()
    timm = transform_of(tmp_path, TIMM)
    clip = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 62},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": TIMM["mean"],
        "image_std": TIMM["std"],
    }
    other = transform_of(tmp_path, clip)
    assert timm.processor.size == other.processor.size
    assert timm.fingerprint() != other.fingerprint()
