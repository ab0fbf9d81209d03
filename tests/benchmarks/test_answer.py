"""The benchmark of answering compares sides that answer alike, and writes its figures."""

import json

import pytest
import torch

from benchmarks import answer


def test_figures_of_the_tiny_shape(tmp_path):
    answer.main(["--tokens", "3", "--runs", "1", "--precision", "float32", "--output", str(tmp_path / "a" / "b.json")])
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    assert report["same_texts"] is True
    assert report["sides"].keys() == {"ours", "transformers"}
    assert all(value > 0 for side in report["sides"].values() for value in side.values())
    assert all(report[name] > 0 for name in report if name.endswith(("sooner", "first", "faster")))


def test_sides_that_answer_differently_are_refused(monkeypatch):
    build = answer.build_models

    def differently(*given):
        model, llava = build(*given)
        with torch.no_grad():
            llava.model.multi_modal_projector.linear_1.weight.neg_()
        return model, llava

    monkeypatch.setattr(answer, "build_models", differently)
    with pytest.raises(SystemExit, match="the sides answer differently"):
        answer.main(["--tokens", "8", "--runs", "1", "--precision", "float32"])
