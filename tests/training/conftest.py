"""Each test trains in a run folder of its own."""

import pytest

from tests.tiny import tiny_config


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
