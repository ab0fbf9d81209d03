"""Our encoder and image transform against outputs of the report's public ancestor (`../shared/oracle`)."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from paths import REPO_ROOT
from visual.encoder import load_encoder
from visual.transform import ImageTransform, load_image

ORACLE = REPO_ROOT.parent / "shared" / "oracle"
TWO_LEVELS = 2 / 127.5  # Pillow's resize changed by up to two of 255 levels between releases
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no oracle at {ORACLE}")


@pytest.fixture(scope="module")
def expected():
    with np.load(ORACLE / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays if name.startswith(("photo.", "siglip.", "pixels_"))}


@pytest.fixture(scope="module")
def writer():
    """`write_checkpoint.py` as a module."""
    spec = importlib.util.spec_from_file_location("write_checkpoint", ORACLE / "write_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    script = [sys.executable, ORACLE / "write_checkpoint.py", "--args", ORACLE / "args.json", "--out", folder]
    subprocess.run(script, check=True, capture_output=True)
    return folder / "siglip"


@torch.no_grad()
def test_last_hidden_state(expected, siglip_folder):
    encoder = load_encoder(siglip_folder, torch.float32, "none")
    pixels = torch.from_numpy(expected["pixels_k64"]).float() / 64
    reference = torch.from_numpy(expected["siglip.last_hidden_state"])
    assert encoder.grid.rows == 729
    torch.testing.assert_close(encoder(pixels), reference, rtol=0, atol=2e-4)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_photo(expected, siglip_folder, writer, tmp_path, number):
    height, width = (int(side) for side in expected[f"photo.{number}.size"])
    Image.fromarray(writer.photo(1, number, height, width)).save(tmp_path / "photo.png")
    pixels = ImageTransform.from_folder(siglip_folder)(load_image(tmp_path / "photo.png")).numpy()
    difference = np.abs(pixels[:, ::5, ::5] - expected[f"photo.{number}.pixel_values_stride5"])
    assert difference.max() <= TWO_LEVELS + 1e-6
    assert difference.mean() < TWO_LEVELS / 20  # most pixels are the same
    levels = (pixels * 127.5 + 127.5).sum(axis=(1, 2))
    np.testing.assert_allclose(levels, expected[f"photo.{number}.u8_sum"], rtol=1e-4)
