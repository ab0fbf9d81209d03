"""Each test trains in a run folder of its own."""

import pytest

from tests.tiny import tiny_config
from training.loop import Trainer

DROPOUT = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}  # so that the random generators' state matters


@pytest.fixture
def configure(workshop, tmp_path):
    """`configure(max_steps=…, data={…})`: a config whose `train` section takes the plain keywords."""

    def build(data=None, llm=None, **train):
        base = tiny_config(workshop).model_dump()
        sections = {"train": base["train"] | {"output_dir": str(tmp_path / "run")} | train}
        sections |= {"data": base["data"] | (data or {}), "llm": base["llm"] | (llm or {}), "model_root": str(workshop)}
        return tiny_config(workshop, **{k: v for k, v in sections.items() if k != "model_root"}).model_copy(
            update={"model_root": str(workshop)}
        )

    return build


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
