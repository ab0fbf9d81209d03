"""Models and photos of the tests of many answers together."""

import numpy as np
import pytest
from PIL import Image

from tests.answering.dialogues import build
from tests.tiny import write_qwen

KINDS = ["qwen2-tied", "qwen3-untied", "llama-tied", "qwen1", "qwen1-short", "sliding", "tiles"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, backbones, tmp_path_factory):
    if request.param == "tiles":
        return build(backbones, visual={"tiles": 4})
    if request.param == "sliding":
        window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
        return build(backbones, write_qwen(tmp_path_factory.mktemp("sliding"), "qwen2", **window))
    return build(backbones, request.param)


@pytest.fixture(scope="module")
def qwen2(backbones):
    return build(backbones)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four photo files of three shapes."""
    folder, sizes = tmp_path_factory.mktemp("photos"), [(112, 112), (168, 60), (60, 130), (112, 112)]
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(sizes))]
