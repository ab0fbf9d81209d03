"""Exports for tests, of tiny models."""

import pytest

from exporting.write import check_export, write_export
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config

# of a model card
NAMES = "name visual visual_licence vision_mode projector_mode llm llm_licence llm_mode data settings scores dtype"
FACTS: dict = dict.fromkeys(NAMES.split(" "), "?") | {"tokens": 15}


@pytest.fixture
def make(backbones):
    """`make(visual={…}, parts={…}, …)`: a model of which every trained weight shows."""

    def build(name="qwen2-tied", visual=None, parts=None, **sections):
        visual = {"path": str(backbones / "siglip")} | (visual or {})
        sections |= {"visual": visual, "llm": {"path": str(backbones / name)} | sections.pop("llm", {})}
        train = {"train": {"parts": parts}} if parts else {}
        model = MMultiModal.from_config(tiny_config(backbones, **sections, **train)).eval()
        fill_trained(model)
        return model

    return build


@pytest.fixture
def export(tmp_path, same_process):
    """`export(model, format)`: the folder and its report; `change(folder)` runs between writing and comparing."""

    def run(model, target="llava", change=None, name="out", weights=""):
        written = write_export(model, tmp_path / name, target, FACTS, weights)
        if change is not None:
            change(written.folder)
        return tmp_path / name, check_export(written)

    return run
