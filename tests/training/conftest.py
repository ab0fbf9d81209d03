"""A folder with tiny backbones and records; each test trains in a run folder of its own."""

import pytest

from tests.tiny import tiny_config, write_qwen, write_records, write_siglip


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    write_siglip(folder / "siglip")
    write_qwen(folder / "qwen")
    write_records(folder)
    return folder


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
