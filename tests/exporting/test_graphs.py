"""The graphs of `--format onnx` and `openvino` give our features, logits and answers."""

import importlib.util

import pytest
import torch

import export as script
from errors import UserError
from exporting.targets import TARGETS
from tests.tiny import write_clip
from tests.visual.test_vit import write as write_tower

# As in test_export.py: the same float32 numbers, summed in another order
EXACT = 1e-5


def needs(target):
    for package in TARGETS[target].packages:
        pytest.importorskip(package)


def worst(report, key):
    return max(question.get(key, 0.0) for question in report["questions"])


def vit(folder):
    return write_tower(folder, "vit")


def dinov2(folder):
    return write_tower(folder, "dinov2")


PARTS = {
    "SigLIP, one-layer keys": ("qwen2-tied", None, {}),
    "CLIP, pixel_shuffle": ("qwen3-untied", write_clip, {"kind": "pixel_shuffle"}),
    "DINOv2, resampler": ("qwen1", dinov2, {"kind": "resampler", "heads": 4}),
    "ViT": ("llama-untied", vit, {}),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_graphs_answer_the_same(make, export, tmp_path, parts):
    needs("onnx")
    name, write, projector = parts
    visual = {"drop": "leading" if projector.get("kind") == "pixel_shuffle" else "first"}
    if write is not None:
        write(tmp_path / "encoder")
        visual["path"] = str(tmp_path / "encoder")
    model = make(name, visual=visual, projector=projector, generate={"max_new_tokens": 6, "repetition_penalty": 1.1})
    folder, report = export(model, "onnx")
    assert report["passed"]
    assert all(question["same"] for question in report["questions"])
    assert worst(report, "features") < EXACT
    assert worst(report, "logits") < EXACT * 10
    assert set(report["versions"]) == {"onnxruntime", "transformers"}
    assert "embed_tokens" in (folder / "README.md").read_text()


def test_openvino_answers_the_same(make, export):
    needs("openvino")
    folder, report = export(make(generate={"max_new_tokens": 6}), "openvino")
    assert all(question["same"] for question in report["questions"])
    assert worst(report, "features") < EXACT
    assert worst(report, "logits") < EXACT * 10
    assert set(report["versions"]) == {"openvino", "transformers"}
    assert not (folder / "onnx").exists()


def test_left_padding_changes_nothing(make, export):
    """A batch in one call of the decoder, with positions and mask as a program for batches writes them."""
    needs("onnx")
    runtime = pytest.importorskip("onnxruntime")
    folder, _ = export(make(generate={"max_new_tokens": 2}), "onnx")
    names = ("embed_tokens", "decoder_model_merged")
    embed, decoder = (runtime.InferenceSession(folder / "onnx" / f"{name}.onnx") for name in names)
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]

    def logits(ids, mask):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        inputs = {"inputs_embeds": embed.run(None, {"input_ids": ids.numpy()})[0]}
        inputs |= {"attention_mask": mask.numpy(), "position_ids": (mask.cumsum(1) - 1).clamp_min(0).numpy()}
        for entry in decoder.get_inputs():
            if entry.name.startswith("past_"):
                inputs[entry.name] = torch.zeros(len(ids), entry.shape[1], 0, entry.shape[3]).numpy()
        return torch.from_numpy(decoder.run(None, inputs)[0])

    both = logits([[0, 0, *short], long], [[0, 0, 1, 1, 1], [1] * 5])
    torch.testing.assert_close(both[:1], logits([short], [[1] * 3]), atol=EXACT, rtol=0)
    torch.testing.assert_close(both[1:], logits([long], [[1] * 5]), atol=EXACT, rtol=0)


def test_an_absent_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx, onnxscript, onnxruntime: pip install -r requirements"):
        script.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--format", "onnx"])


def test_bfloat16_graphs_are_refused(make):
    model = make()
    model.encoder.to(torch.bfloat16)
    with pytest.raises(UserError, match="add --dtype float32 or --dtype float16"):
        TARGETS["onnx"].check(model)
