"""Each test trains in a run folder of its own."""

import functools
import json
import shutil

import pytest

from tests.conftest import forget_accelerator
from tests.tiny import run_config, tiny_config, write_clip
from training.loop import Trainer

DROPOUT = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}  # so that the random generators' state matters


def saving_config(workshop, root, folder="run", data=None, llm=None, prompt=None, **train):
    """A run of four steps with dropout, in a folder of `root`, that saves and logs each."""
    settings = {"save_steps": 1, "log_steps": 1, "save_total_limit": 9, "max_steps": 4, "trackers": []} | train
    made = run_config(workshop, data, llm or DROPOUT, output_dir=str(root / folder), **settings)
    return made.model_copy(update={"prompt": made.prompt.model_copy(update=prompt or {})})


@pytest.fixture
def config(workshop, tmp_path):
    """`config(folder, **train)`: see `saving_config`."""
    return functools.partial(saving_config, workshop, tmp_path)


@pytest.fixture(scope="session")
def trained_whole(workshop, tmp_path_factory):
    folder = Trainer(saving_config(workshop, tmp_path_factory.mktemp("trained"), "whole")).run().parent
    forget_accelerator()
    return folder


@pytest.fixture
def whole(trained_whole, tmp_path):
    """The folder of an uninterrupted run, which a test may change."""
    return shutil.copytree(trained_whole, tmp_path / "whole")


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
            generate={"max_new_tokens": 1},  # of the answers in samples.html
        )
        return {"name": name, "config": config.model_dump(mode="json")} | (more or {})

    make.root = root
    return make
