"""Each test trains in a run folder of its own."""

import pytest

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
