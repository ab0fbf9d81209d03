"""How a photo is cut into tiles: the choice of the grid by hand and by brute force, the pixels by the processor."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from errors import UserError
from visual.transform import ImageTransform

NORMAL = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
}
KINDS = {
    "siglip": SIGLIP,
    "clip": CLIP,
    # resizes to more than it crops, so that resizing a tile once more would show
    "dinov2": CLIP | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}},
    "dinov3": SIGLIP | {"image_processor_type": "DINOv3ViTImageProcessor"},
    "wide": SIGLIP | {"size": {"height": 28, "width": 56}},
}


@pytest.fixture(params=KINDS)
def transform(request, tmp_path):
    return transform_of(tmp_path, request.param)


def transform_of(folder, kind):
    (folder / "preprocessor_config.json").write_text(json.dumps(KINDS[kind] | NORMAL), encoding="utf-8")
    return ImageTransform.from_folder(folder)


@pytest.fixture(scope="module")
def transforms(tmp_path_factory):
    return {kind: transform_of(tmp_path_factory.mktemp(kind), kind) for kind in ("siglip", "wide")}


@pytest.mark.parametrize("shape", [(90, 60), (60, 150), (70, 70)])
def test_the_seen_part_is_the_one_in_the_crop(transform, shape):
    width, height = shape
    across = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    down = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None], (height, width))
    image = Image.fromarray(np.stack([across, down, down], axis=-1))
    pixels = transform(image).permute(1, 2, 0) * torch.tensor(NORMAL["image_std"]) + torch.tensor(NORMAL["image_mean"])
    pixels = pixels * 255  # (H, W, 3): the place in the photo that each pixel shows
    left, top, right, bottom = transform.seen(width, height)
    rows, columns = pixels.shape[:2]
    # the centres of the second and of the middle pixel; at the edge, the filter leans inwards
    for column in (1, columns // 2):
        shown = left + (column + 0.5) / columns * (right - left) - 0.5
        assert pixels[rows // 2, column, 0].item() == pytest.approx(shown, abs=1.5)  # half a pixel, and 8-bit rounding
    for row in (1, rows // 2):
        assert pixels[row, columns // 2, 1].item() == pytest.approx(
            top + (row + 0.5) / rows * (bottom - top) - 0.5, abs=1.5
        )


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestChoice:
    @pytest.mark.parametrize(
        ("width", "height", "most", "expected"),
        [
            (56, 56, 12, (0, 0)),  # as large as a crop
            (10, 56, 12, (0, 0)),  # smaller, whatever its shape
            (57, 56, 1, (0, 0)),  # one tile is the whole photo again
            (57, 56, 0, (0, 0)),
            (
                112,
                56,
                12,
                (1, 2),
            ),  # as near as 2×4, which needs 8 · 56 · 56 / 2 = 12,544 px, and it has 6,272
            (158, 79, 12, (1, 2)),  # 12,482 px
            (160, 80, 12, (2, 4)),  # 12,800 px
            (160, 80, 7, (1, 2)),
            (80, 160, 12, (4, 2)),
            (79, 79, 12, (0, 0)),  # 6,241 px; 2×2 needs 6,272, so the nearest grid is 1×1
            (80, 80, 12, (2, 2)),
            (118, 118, 12, (2, 2)),  # 13,924 px; 3×3 needs 14,112
            (119, 119, 12, (3, 3)),
            (300, 100, 12, (2, 6)),  # 3 : 1
            (300, 100, 11, (1, 3)),
            (300, 200, 12, (2, 3)),  # 3 : 2
            (300, 200, 5, (1, 2)),  # 2 : 1 is 4/3 off, 1 : 1 is 3/2
            (5600, 56, 12, (1, 12)),
        ],
    )
    def test_by_hand(self, transforms, width, height, most, expected):
        assert transforms["siglip"].tiles(width, height, most) == expected

    @pytest.mark.parametrize("kind", ["siglip", "wide"])
    @given(
        width=st.one_of(st.integers(1, 600), st.sampled_from([56, 112, 168, 224, 336])),
        height=st.one_of(st.integers(1, 600), st.sampled_from([28, 56, 112, 168, 224])),
        most=st.integers(0, 16),
    )
    @example(width=112, height=112, most=9)
    def test_every_grid_is_tried(self, transforms, kind, width, height, most):
        tile_height, tile_width = transforms[kind].size
        rows, columns = transforms[kind].tiles(width, height, most)
        if width <= tile_width and height <= tile_height:
            assert (rows, columns) == (0, 0)
            return
        assert (rows, columns) != (1, 1)
        rows, columns = max(rows, 1), max(columns, 1)  # one crop has the shape of one tile
        assert rows * columns <= max(most, 1)

        def distance(rows, columns):
            return abs(math.log(width / height) - math.log(columns * tile_width / (rows * tile_height)))

        def enough(tiles):
            return width * height >= tiles * tile_height * tile_width / 2

        grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most] or [(1, 1)]
        nearest = min(distance(*grid) for grid in grids)
        # of different fractions of whole numbers this small the logarithms differ by more than 1e-9
        tied = sorted(r * c for r, c in grids if distance(r, c) < nearest + 1e-9)
        assert distance(rows, columns) < nearest + 1e-9
        assert rows * columns == max([tied[0], *(tiles for tiles in tied if enough(tiles))])


class TestCrops:
    @pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 3), (4, 3)])
    def test_tiles_together_are_the_resized_photo(self, transform, rows, columns):
        height, width = transform.size
        photo = picture(83, 121)
        crops = transform.crops(photo, rows, columns)
        assert crops.shape == (1 + rows * columns, 3, height, width)
        assert crops.dtype == torch.float32
        assert torch.equal(crops[0], transform(photo))
        tiles = crops[1:].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # (3, rows, H, columns, W)
        whole = tiles.reshape(3, rows * height, columns * width)
        resized = np.asarray(photo.resize((columns * width, rows * height), Image.Resampling.BICUBIC))
        mean, std = (np.array(NORMAL[name]) for name in ("image_mean", "image_std"))
        expected = torch.from_numpy((resized / 255 - mean) / std).permute(2, 0, 1)
        # float32 beside float64, values up to 3
        torch.testing.assert_close(whole.double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", ["siglip", "clip", "dinov3", "wide"])
    def test_a_tile_has_the_right_size_already(self, tmp_path, kind):
        """So the processor, with its resizing and cropping, gives the same of it."""
        transform = transform_of(tmp_path, kind)
        height, width = transform.size
        photo = picture(83, 121)
        crops = transform.crops(photo, 2, 2)
        canvas = photo.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        for number, (top, left) in enumerate([(0, 0), (0, width), (height, 0), (height, width)], start=1):
            tile = canvas.crop((left, top, left + width, top + height))
            assert torch.equal(crops[number], transform(tile))

    def test_no_tiles(self, transform):
        assert torch.equal(transform.crops(picture(83, 121), 0, 0), transform(picture(83, 121))[None])

    def test_refuses_what_the_whole_photo_refuses(self, tmp_path):
        transform = transform_of(tmp_path, "dinov2")
        with pytest.raises(UserError, match="more than 100 times"):
            transform.crops(picture(1, 300), *transform.tiles(300, 1, 4))
        with pytest.raises(ValueError, match="not RGB"):
            transform.crops(picture(83, 121).convert("L"), 1, 2)
