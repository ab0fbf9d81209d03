"""A pretrained ViT and a pretrained language model learn to caption real photos together. Minutes on two CPU cores."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml

from config import parse_config
from paths import REPO_ROOT
from process_image import main as prepare
from tests.training.runs import losses
from training.loop import Trainer

REAL = Path(REPO_ROOT).parent / "shared" / "real"  # beside the repository, not part of it; its README says what it is
LANGUAGE_MODEL = "REAL_LANGUAGE_MODEL"  # a folder that get_language_model.py has filled already


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """SmolLM2-135M-Instruct in Qwen2's layout."""
    if not REAL.is_dir():
        pytest.skip(f"no real backbones at {REAL}")
    if LANGUAGE_MODEL in os.environ:
        return os.environ[LANGUAGE_MODEL]
    if importlib.util.find_spec("gguf") is None:
        pytest.skip(f"pip install gguf==0.19.0, or set {LANGUAGE_MODEL} to a folder made by get_language_model.py")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(REAL / "get_language_model.py"), str(folder)], check=True)
    return str(folder)


@pytest.fixture
def all_cores():
    """tests/conftest.py leaves torch one thread, which suits tiny models only."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.nightly
@pytest.mark.usefixtures("all_cores")
def test_they_learn_to_caption(language_model, tmp_path):
    data = {
        "sources": [
            {
                "name": "flickr8k",
                "format": "coco_captions",
                "annotations": str(REAL / "flickr8k" / "train_en.json"),
                "images": str(REAL / "flickr8k" / "train"),
            }
        ],
        "image_map": str(tmp_path / "image_map.json"),
        "captions": str(tmp_path / "captions.json"),
        "val_fraction": 0.0,
        "answers": "all",
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    prepare(["--config", str(tmp_path / "data.yaml")])
    raw = {
        "data": data,
        "prompt": {"system": "", "image_first": True},
        "visual": {"path": str(REAL / "models" / "vit-tiny-patch16-224"), "drop": "leading"},
        "llm": {"path": language_model, "lora": {"r": 16, "alpha": 32, "dropout": 0.05}},
        "projector": {"kind": "pixel_shuffle", "factor": 2},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 50,
            "micro_batch": 8,
            "precision": "float32",
            "parts": {"projector": {"lr": 2e-3}, "llm": {"lr": 3e-4}},
            "log_steps": 1,
            "workers": 0,
            "trackers": [],
        },
    }
    Trainer(parse_config(raw, "real")).run()
    curve = losses(tmp_path / "run")
    print(json.dumps(curve))
    assert curve[1] > 3.5
    assert mean(curve[step] for step in range(46, 51)) < 3.0
