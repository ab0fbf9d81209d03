"""The graphs of `--format onnx` and `openvino` give our features, logits and answers."""

import importlib.util
import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch

import export as script
from errors import UserError
from exporting import onnx_graphs, openvino_graphs
from exporting.card import QUANTISED, write_card
from exporting.targets import TARGETS
from paths import REPO_ROOT
from tests.exporting.conftest import FACTS
from tests.tiny import write_clip, write_qwen
from tests.visual.test_vit import write as write_tower

# As in test_export.py: the same float32 numbers, summed in another order
EXACT = 1e-5


def needs(target, weights="same"):
    for package in TARGETS[target].packages + TARGETS[target].quantised_packages.get(weights, ()):
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


def calm(make, folder, **settings):
    """A model that small changes of its weights change little: random ones of the usual size are far too sharp."""
    write_qwen(folder / "calm", initializer_range=0.05, **settings)
    model = make(llm={"path": str(folder / "calm")}, generate={"max_new_tokens": 2})
    for parameter in model.language_model.parameters():
        if parameter.requires_grad:
            parameter.data /= 10
    return model


def test_fewer_bits_make_smaller_files(make, export, tmp_path):
    """8 bits are a quarter of float32, 4 an eighth; 64 weights of 4 bits share 2.5 bytes of scale and zero point."""
    needs("openvino", "int8")
    sizes, reports = [], []
    for weights in ("int8", "int4"):
        model = calm(make, tmp_path, hidden_size=128, intermediate_size=256)
        state = model.language_model.state_dict()
        folder, report = export(model, "openvino", name=weights, weights=weights)
        sizes.append({file.stem: file.stat().st_size for file in (folder / "openvino").glob("*.bin")})
        reports.append(report)
    whole = 4 * state["model.embed_tokens.weight"].numel()  # bytes of the embedding, and of the output matrix
    layers = 4 * sum(tensor.numel() for name, tensor in state.items() if ".layers." in name and ".lora_" not in name)
    eight, four = sizes
    assert whole / 4 < eight["embed_tokens"] < whole / 4 * 1.1
    assert layers / 4 < eight["decoder_model_merged"] - eight["embed_tokens"] < layers / 4 * 1.1
    assert layers / 8 < four["decoder_model_merged"] - four["embed_tokens"] < layers / 8 * 1.2
    assert [name for name, size in four.items() if size != eight[name]] == ["decoder_model_merged"]
    assert [report["weights"] for report in reports] == ["int8", "int4"]
    assert reports[1]["allowed"]["logits"] > reports[0]["allowed"]["logits"] > EXACT
    assert worst(reports[1], "logits") > worst(reports[0], "logits") > EXACT * 10


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("float16", "three graphs, in float16:"),
        ("int8", "three graphs, with weights in 8 bits, computed in float16:"),
        ("int4", "layers in 4 bits and all others in 8, computed in float16:"),
    ],
)
def test_the_card_names_the_weights(tmp_path, weights, words):
    report = {"format": "openvino", "weights": weights, "passed": False, "problems": ["none"]}
    write_card(tmp_path, FACTS | {"dtype": "float16"}, report)
    assert words in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_every_kind_of_graph_weights_has_words_for_the_card():
    assert QUANTISED.keys() == TARGETS["openvino"].quantised.keys()


@pytest.mark.parametrize(
    ("message", "kind"), [("basic_ios::clear: iostream error", OSError), ("unknown operation", RuntimeError)]
)
def test_a_full_disk_under_openvino_is_no_defect(tmp_path, monkeypatch, message, kind):
    class Library:
        Core = MagicMock

        @staticmethod
        def save_model(*_, **__):
            raise RuntimeError(message)

    monkeypatch.setattr(openvino_graphs, "import_openvino", Library)
    monkeypatch.setattr(openvino_graphs, "write_onnx", lambda *_: 0.0)
    with pytest.raises(kind, match=message):
        openvino_graphs.write(None, None, tmp_path)


def test_widths_that_no_group_fits(make, export, tmp_path):
    """Rows of 48 numbers are cut into none of 64 or 32, and get 8 bits."""
    needs("openvino", "int4")
    _, report = export(calm(make, tmp_path), "openvino", weights="int4")
    assert report["passed"]


def test_4_bits_hide_no_wrong_file(make, export, tmp_path, monkeypatch):
    """The model of the test above, which passes, with each token in the next one's row."""
    needs("openvino", "int4")
    merged = onnx_graphs.merged_tensors

    def shifted(module):
        rows = ("model.embed_tokens.weight", "lm_head.weight")
        return {name: tensor.roll(1, 0) if name in rows else tensor for name, tensor in merged(module).items()}

    monkeypatch.setattr(onnx_graphs, "merged_tensors", shifted)
    with pytest.raises(UserError, match="the logits differ by .* standard deviations"):
        export(calm(make, tmp_path), "openvino", weights="int4")


def test_no_statistics_are_sent(tmp_path):
    """OpenVINO's library for it writes a number of the user into the home folder before it sends anything."""
    needs("openvino", "int4")
    code = "from exporting.stock_check import import_openvino; import_openvino(); import nncf.telemetry"
    home = os.environ | {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, env=home, check=True)
    assert list(tmp_path.iterdir()) == []


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


def test_absent_nncf_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find("json"))
    arguments = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--format", "openvino"]
    with pytest.raises(UserError, match="--weights int4 needs nncf: pip install -r requirements-export.txt"):
        script.main([*arguments, "--weights", "int4"])


def test_weights_of_another_format_are_refused(tmp_path):
    arguments = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--format", "gguf"]
    with pytest.raises(UserError, match="--weights int4: only --format openvino has such weights"):
        script.main([*arguments, "--weights", "int4"])


def test_bfloat16_graphs_are_refused(make):
    model = make()
    model.encoder.to(torch.bfloat16)
    with pytest.raises(UserError, match="add --dtype float32 or --dtype float16"):
        TARGETS["onnx"].check(model)
