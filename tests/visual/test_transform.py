"""Every kind of picture becomes the right RGB, every broken one a clear sentence, pixels equal the HF processor's."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import visual.photo
from errors import UserError
from paths import REPO_ROOT
from visual.photo import photo_size
from visual.transform import PHOTO_FORMATS, ImageTransform, load_image

SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}  # google/siglip-so400m-patch14-384
CLIP = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}  # openai/clip-vit-large-patch14-336

VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}  # google/vit-base-patch16-224
VIT_OLD = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}  # facebook/dino-vits16
DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}  # facebook/dinov2-base


def folder_of(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def picture(height=37, width=61, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def colours(image):
    """(H, W, 3) as nested lists."""
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored lying, seen upright
    return saved(picture(), "PNG", exif=exif), picture().transpose(Image.Transpose.ROTATE_270)


def gray():
    return saved(picture().convert("L"), "PNG"), picture().convert("L").convert("RGB")


def sixteen_bit():
    values = np.asarray(picture().convert("L"))
    return saved(Image.fromarray(values.astype(np.uint16) * 257), "PNG"), Image.fromarray(values).convert("RGB")


def palette():
    image = picture().quantize(17)
    return saved(image, "PNG"), image.convert("RGB")


def see_through():
    alpha = np.random.default_rng(1).integers(0, 2, (37, 61), dtype=np.uint8) * 255
    image = picture()
    image.putalpha(Image.fromarray(alpha))
    return saved(image, "PNG"), Image.fromarray(np.where(alpha[..., None] > 0, np.asarray(picture()), np.uint8(255)))


def cmyk():
    inverse = 255 - np.asarray(picture())  # no black ink: red = 255 - cyan, and so on
    inks = np.concatenate([inverse, np.zeros((37, 61, 1), np.uint8)], axis=2)
    return saved(Image.fromarray(inks, "CMYK"), "TIFF"), picture()


def animation(kind, **options):
    first = picture().quantize(200).convert("RGB")  # a GIF frame has at most 256 colours
    return saved(first, kind, save_all=True, append_images=[Image.new("RGB", first.size)], **options), first


# a file of this kind, and the RGB picture a person sees in it
KINDS = {
    "EXIF-rotated": rotated,
    "gray": gray,
    "16 bit": sixteen_bit,
    "palette": palette,
    "RGBA": see_through,
    "CMYK": cmyk,
    "GIF": lambda: animation("GIF"),
    "APNG": lambda: animation("PNG"),
    "animated WebP": lambda: animation("WEBP", lossless=True),
}


class TestLoadImage:
    def test_path_stream_and_picture_give_the_same(self, tmp_path):
        path = tmp_path / "照片 1.png"
        picture().save(path)
        expected = colours(picture())
        for file in (path, str(path), io.BytesIO(path.read_bytes()), Image.open(path)):
            assert colours(load_image(file)) == expected

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_exif_orientation(self, tmp_path, kind, orientation):
        upright = Image.new("RGB", (32, 16), "white")
        upright.paste("red", (0, 0, 8, 8))  # top left
        undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose that makes what the camera stored
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = saved(stored, kind, exif=exif)
        image = load_image(file)
        (tmp_path / "photo").write_bytes(file.getvalue())
        assert image.size == photo_size(tmp_path / "photo") == (32, 16)
        assert image.getpixel((3, 3))[1] < 100
        assert all(image.getpixel(corner)[1] > 150 for corner in [(28, 3), (3, 12), (28, 12)])

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize("block", [b"MM\0*\0\0\0\x08\xff\xff\xff\xff", b"no TIFF header", b"MM\0*\0\0"])
    def test_damaged_exif_loses_no_photo(self, block):
        assert load_image(saved(picture(), "JPEG", exif=b"Exif\0\0" + block)).size == (61, 37)

    def test_damaged_tag_beside_orientation_keeps_the_orientation(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "Maker of the camera"
        block = exif.tobytes().replace(b"\x01\x0f", b"\x01\x00", 1)  # the image width is now a text
        assert load_image(saved(picture(37, 61), "JPEG", exif=block)).size == (37, 61)

    def test_gray(self):
        assert colours(load_image(saved(Image.new("L", (1, 1), 77), "PNG"))) == [[[77, 77, 77]]]

    def test_black_and_white(self):
        assert colours(load_image(saved(Image.new("1", (1, 1), 1), "PNG"))) == [[[255, 255, 255]]]

    def test_alpha_on_white(self):
        image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
        image.putpixel((1, 0), (10, 20, 30, 0))
        image.putpixel((2, 0), (0, 0, 0, 128))
        assert colours(load_image(saved(image, "PNG"))) == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]

    def test_gray_with_alpha(self):
        image = Image.new("LA", (2, 1), (9, 255))
        image.putpixel((1, 0), (9, 0))
        assert colours(load_image(saved(image, "PNG"))) == [[[9, 9, 9], [255, 255, 255]]]

    @pytest.mark.parametrize("kind", ["PNG", "GIF"])
    def test_palette_with_transparency(self, kind):
        image = Image.new("P", (2, 1), 0)
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.putpixel((1, 0), 1)
        assert colours(load_image(saved(image, kind)))[0] == [[200, 0, 0], [0, 200, 0]]
        assert colours(load_image(saved(image, kind, transparency=1)))[0] == [[200, 0, 0], [255, 255, 255]]

    def test_transparent_colour_of_rgb(self):
        image = Image.new("RGB", (2, 1), (1, 2, 3))
        image.putpixel((1, 0), (4, 5, 6))
        file = saved(image, "PNG", transparency=(4, 5, 6))
        assert colours(load_image(file)) == [[[1, 2, 3], [255, 255, 255]]]

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
    def test_cmyk(self, kind):
        image = load_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() <= 3

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bit_is_scaled(self, kind):
        values = np.array([[0, 257, 32768, 51400, 65535]], dtype=np.uint16)
        [row] = colours(load_image(saved(Image.fromarray(values), kind)))
        assert [pixel[0] for pixel in row] == [0, 1, 128, 200, 255]
        assert all(pixel == [pixel[0]] * 3 for pixel in row)

    def test_sixteen_bit_in_32_bit_pixels(self):
        image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
        assert colours(load_image(image)) == [[[0, 0, 0], [255, 255, 255]]]

    @pytest.mark.parametrize("array", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)])
    def test_unclear_range_is_refused(self, array):
        with pytest.raises(ValueError, match="have no plain RGB form"):
            load_image(saved(Image.fromarray(array), "TIFF"))

    @pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
    def test_first_frame_of_an_animation(self, kind, options):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
        file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(file).n_frames == 2
        assert load_image(file).getpixel((0, 0)) == (255, 0, 0)

    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match=r"photo not found: .*none\.jpg"):
            load_image(tmp_path / "none.jpg")

    def test_empty(self, tmp_path):
        (tmp_path / "a.jpg").touch()
        with pytest.raises(ValueError, match=r"a\.jpg: the file is empty"):
            load_image(tmp_path / "a.jpg")

    def test_not_an_image(self, tmp_path):
        (tmp_path / "a.jpg").write_text("<html>404</html>", encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.jpg: not an image in a format that is read: JPEG, PNG"):
            load_image(tmp_path / "a.jpg")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_truncated(self, tmp_path, kind):
        path = tmp_path / f"cut.{kind.lower()}"
        picture(200, 200).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"cut\.{kind.lower()}: (damaged or cut off|cannot be read|not an image)"):
            load_image(path)

    def test_decompression_bomb(self, tmp_path, monkeypatch):
        picture(100, 100).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
        with pytest.raises(ValueError, match=r"bomb\.png: too many pixels .*10000.*at most 64 megapixels are"):
            load_image(tmp_path / "bomb.png")

    def test_too_many_pixels_are_refused_by_the_header(self, tmp_path, monkeypatch):
        path = tmp_path / "large.png"
        Image.new("1", (8001, 8000)).save(path)
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"large\.png: 64\.0 megapixels \(8,001 × 8,000\), more than the 64 "):
            load_image(path)
        with pytest.raises(ValueError, match=r"more than the 1 that are decoded: make the photo smaller"):
            load_image(Image.open(path), max_pixels=1_000_000)

    @pytest.mark.parametrize("kind", ["WEBP", "JPEG2000"])
    def test_half_of_them_in_formats_that_cost_twice(self, kind):
        file = saved(picture(60, 100), kind)
        assert load_image(file, max_pixels=12_000).size == (100, 60)
        with pytest.raises(ValueError, match=rf"more than the 0\.005999 that are decoded of {kind}"):
            load_image(file, max_pixels=11_998)
        assert load_image(saved(picture(60, 100), "PNG"), max_pixels=6_000).size == (100, 60)

    def test_tile_larger_than_its_picture(self):
        content = zlib.compress(bytes(16_384))
        # width, height, bits, deflate, black is 0, samples, width and height of a tile, its place and length
        tags = [(256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (277, 1), (322, 128), (323, 128), (324, 134)]
        entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, len(content))]]
        file = io.BytesIO(b"II*\0" + struct.pack("<IH", 8, 10) + b"".join(entries) + bytes(4) + content)
        assert load_image(file, max_pixels=16_384).size == (10, 10)
        with pytest.raises(ValueError, match=r"\(128 × 128\) in one tile, more than"):
            load_image(file, max_pixels=16_383)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "CMYK"])
    def test_bands_meet(self, mode, monkeypatch):
        image = picture(50, 7)
        if mode == "I;16":
            image = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (50, 7), dtype=np.uint16))
        elif mode in ("RGBA", "LA"):
            image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 7), dtype=np.uint8)))
            image = image.convert(mode)
        else:
            image = image.convert(mode)
        whole = load_image(image)
        monkeypatch.setattr(visual.photo, "BAND_PIXELS", 3 * 7)
        assert colours(load_image(image)) == colours(whole)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
    def test_memory_of_a_large_photo(self, tmp_path):
        """36 megapixels: 4 bytes each as decoded and 4 as RGB; each copy more would be 137 MiB."""
        code = (
            "import sys; from visual.photo import load_image\n"
            "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
            "before = peak(); load_image(sys.argv[1]); print(peak() - before)"
        )
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGBA", (6000, 6000), (9, 9, 9, 9)).save(tmp_path / "a.png", exif=exif, compress_level=1)
        Image.fromarray(np.full((6000, 6000), 999, np.uint16)).save(tmp_path / "b.png", compress_level=1)
        for name in ("a.png", "b.png"):
            command = [sys.executable, "-c", code, str(tmp_path / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO_ROOT)
            assert float(done.stdout) < 8 * 36e6 / 2**20 + 50

    @pytest.mark.skipif(sys.platform == "win32", reason="a shell script takes the place of Ghostscript")
    def test_no_other_program_starts(self, tmp_path, monkeypatch):
        tool = tmp_path / "gs"
        tool.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n", encoding="utf-8")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
        photo = tmp_path / "photo.jpg"
        picture().save(photo, "EPS")
        with contextlib.suppress(OSError):
            Image.open(photo).load()
        assert (tmp_path / "started").exists(), "this is what Pillow does"
        (tmp_path / "started").unlink()
        for file in (photo, io.BytesIO(photo.read_bytes())):
            with pytest.raises(ValueError, match="not an image in a format that is read"):
                load_image(file)
        assert not (tmp_path / "started").exists()

    @pytest.mark.parametrize("kind", PHOTO_FORMATS)
    def test_every_listed_format_is_read(self, kind):
        assert load_image(saved(picture(), kind)).size == (61, 37)

    def test_camera_jpeg_with_several_views(self):
        file = saved(picture(), "MPO", save_all=True, append_images=[picture()])
        assert Image.open(file).format == "MPO"
        assert load_image(file).size == (61, 37)

    def test_names_that_are_no_photos(self, tmp_path):
        for name, message in [
            (tmp_path, "a folder, not a photo"),
            (tmp_path / ("x" * 300), r"photo .*xxx"),
            ("a\0.jpg", r"'a\\x00\.jpg' is not a file name"),
            (tmp_path / "a.jpg" / "b.jpg", r"photo .*b\.jpg"),
        ]:
            (tmp_path / "a.jpg").touch()
            with pytest.raises(UserError, match=message) as caught:
                load_image(name)
            assert len(str(caught.value)) < 400

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
    def test_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "a.jpg")
        with pytest.raises(UserError, match=r"a\.jpg: not a regular file, not a photo"):
            load_image(tmp_path / "a.jpg")

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @settings(max_examples=150)
    @given(
        st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"]),
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=5),
        st.integers(0, 3000),
    )
    def test_damage_is_a_value_error_or_harmless(self, kind, damage, length):
        content = bytearray(saved(picture(20, 20), kind).getvalue())
        for place, value in damage:
            content[place % len(content)] = value
        with contextlib.suppress(ValueError):
            assert load_image(io.BytesIO(content[: length or None])).mode == "RGB"


class TestImageTransform:
    @pytest.mark.parametrize("size", [(37, 61), (61, 37), (384, 384), (1, 1), (700, 300)])
    @pytest.mark.parametrize(
        ("config", "processor", "edge"),
        [
            (SIGLIP, SiglipImageProcessorPil, (384, 384)),
            (CLIP, CLIPImageProcessorPil, (336, 336)),
            (VIT, ViTImageProcessorPil, (224, 224)),
            (VIT_OLD, ViTImageProcessorPil, (224, 224)),
            (DINOV2, BitImageProcessorPil, (224, 224)),
        ],
        ids=["siglip", "clip", "vit", "vit-old", "dinov2"],
    )
    def test_equals_the_checkpoints_processor(self, tmp_path, config, processor, edge, size):
        transform = ImageTransform.from_folder(folder_of(tmp_path, config))
        pixels = transform(picture(*size))
        expected = processor.from_pretrained(tmp_path)(picture(*size), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)
        assert pixels.dtype == torch.float32
        assert pixels.shape == (3, *transform.size)
        assert transform.size == edge

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_file_equals_the_processor_on_what_a_person_sees(self, tmp_path, kind):
        file, seen = KINDS[kind]()
        pixels = ImageTransform.from_folder(folder_of(tmp_path, SIGLIP))(load_image(file))
        expected = SiglipImageProcessorPil.from_pretrained(tmp_path)(seen, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected)

    def test_photo_that_is_too_long_for_a_crop_of_its_middle(self, tmp_path):
        transform = ImageTransform.from_folder(folder_of(tmp_path, CLIP))
        assert transform(picture(7, 700)).shape == (3, 336, 336)
        with pytest.raises(UserError, match="^photo is 701×7, more than 100 times wider than high, .*: crop it$"):
            transform(picture(7, 701))
        with pytest.raises(UserError, match="^photo is 1×20000, more than 100 times longer than wide, .*: crop it$"):
            transform(picture(20000, 1))
        # nothing is cut off, so the whole strip is seen
        assert ImageTransform.from_folder(folder_of(tmp_path, SIGLIP))(picture(20000, 1)).shape == (3, 384, 384)

    def test_values_are_those_of_the_model_card(self, tmp_path):
        transform = ImageTransform.from_folder(folder_of(tmp_path, SIGLIP))
        pixels = transform(Image.new("RGB", (5, 9), (255, 0, 51)))  # (x / 255 - 0.5) / 0.5
        assert torch.allclose(pixels.mean(dim=(1, 2)), torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)

    def test_unequal_height_and_width(self, tmp_path):
        config = SIGLIP | {"size": {"height": 28, "width": 56}}
        transform = ImageTransform.from_folder(folder_of(tmp_path, config))
        assert transform.size == (28, 56)
        assert transform(picture()).shape == (3, 28, 56)

    def test_refuses_what_did_not_pass_load_image(self, tmp_path):
        transform = ImageTransform.from_folder(folder_of(tmp_path, SIGLIP))
        with pytest.raises(ValueError, match="the picture is L, not RGB: pass it through load_image first"):
            transform(picture().convert("L"))

    def test_fingerprint_tells_settings_apart(self, tmp_path):
        changes = [
            {},
            {"resample": 2},
            {"size": {"height": 224, "width": 224}},
            {"image_mean": [0.4, 0.5, 0.5]},
            {"image_std": [0.5, 0.5, 0.4]},
            {"rescale_factor": 0.5},
            {"do_normalize": False},
        ]
        prints = [ImageTransform.from_folder(folder_of(tmp_path, SIGLIP | change)).fingerprint() for change in changes]
        assert len(set(prints)) == len(changes)
        unseen = SIGLIP | {"processor_class": "Other", "image_processor_type": "SiglipImageProcessorFast"}
        assert ImageTransform.from_folder(folder_of(tmp_path, unseen)).fingerprint() == prints[0]

    def test_fingerprint_is_the_same_in_every_release(self, tmp_path):
        assert ImageTransform.from_folder(folder_of(tmp_path, SIGLIP)).fingerprint() == "49f988a5a711d280"

    def test_no_file(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"preprocessor_config\.json not found: copy it from the vision checkpoint"
        ):
            ImageTransform.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ([], "expected an object, found list"),
            (
                SIGLIP | {"image_processor_type": "Siglip2ImageProcessor"},
                "image processor 'Siglip2ImageProcessor' is not",
            ),
            (SIGLIP | {"do_resize": False}, "gives photos no fixed height and width"),
            (SIGLIP | {"size": {"shortest_edge": 384}}, "gives photos no fixed height and width"),
        ],
    )
    def test_wrong_file(self, tmp_path, config, message):
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
            ImageTransform.from_folder(folder_of(tmp_path, config))

    def test_broken_file(self, tmp_path):
        (tmp_path / "preprocessor_config.json").write_text('{"size": ', encoding="utf-8")
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: not valid JSON"):
            ImageTransform.from_folder(tmp_path)


def test_real_photos_equal_the_processor(samples_folder, tmp_path):
    transform = ImageTransform.from_folder(folder_of(tmp_path, SIGLIP))
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path)
    photos = sorted(samples_folder.rglob("*.jpg"))
    assert photos
    for path in photos:
        seen = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        assert torch.equal(transform(load_image(path)), processor(seen, return_tensors="pt")["pixel_values"][0]), path
