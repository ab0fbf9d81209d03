"""Each test trains in a run folder of its own."""

import json

import pytest

from tests.tiny import tiny_config, write_clip
from training.loop import Trainer

DROPOUT = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}  # so that the random generators' state matters


@pytest.fixture
def config(configure, tmp_path):
    """`config(folder, **train)`: a run of four steps with dropout that saves and logs each."""

    def build_config(folder="run", data=None, llm=None, prompt=None, **train):
        settings = {"save_steps": 1, "log_steps": 1, "save_total_limit": 9, "max_steps": 4, "trackers": []} | train
        made = configure(data=data, llm=llm or DROPOUT, output_dir=str(tmp_path / folder), **settings)
        return made.model_copy(update={"prompt": made.prompt.model_copy(update=prompt or {})})

    return build_config


@pytest.fixture
def whole(config):
    """The folder of an uninterrupted run."""
    return Trainer(config("whole")).run().parent


@pytest.fixture(scope="module")
def make_case(workshop, tmp_path_factory):
    """`make_case(name, data={…}, **train)`: a run of three steps in a folder of its own."""
    root = tmp_path_factory.mktemp("processes")
    captions = json.loads((workshop / "captions.json").read_text())
    captions["0"].pop()  # leaves 12 samples, one with text only: as many micro-batches for one to four
    (root / "captions.json").write_text(json.dumps(captions))

    write_clip(root / "clip")

    def make(name, data=None, more=None, folder=None, visual=None, **train):
        settings = {"micro_batch": 1, "max_steps": 3, "log_steps": 1, "max_questions": 2, "trackers": []} | train
        config = tiny_config(
            workshop,
            data={"captions": str(root / "captions.json")} | (data or {}),
            visual={
                "path": str(workshop / "siglip" if visual is None else root / visual),
                "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
            },
            train=settings | {"output_dir": str(root / (folder or name))},
        )
        return {"name": name, "config": config.model_dump(mode="json")} | (more or {})

    make.root = root
    return make
