"""Where backbones come from, and the sentence each wrong folder gets."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.backbone import backbone_fingerprint, locate_backbone, remember_backbones
from errors import UserError
from model.model import MMultiModal
from tests.tiny import tiny_config, to_bin

WEIGHTS = "model.safetensors"


def locate(folder):
    return locate_backbone(str(folder), "models", "llm.path")


def shard(folder):
    """Turn model.safetensors into two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in range(2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    table = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")


class WritesFile:
    """Unpickling it creates a file: what a malicious checkpoint could do."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_name_typed_wrong_gets_the_nearest(folder):
    with pytest.raises(ValueError, match=r"'llm.path': no folder .*qwn.*Did you mean .*qwen\?"):
        locate(folder.with_name("qwn"))


def test_hint_names_model_folders_or_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "qwem").mkdir()
    (tmp_path / "qwen.py").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"no folder .* Did you mean {folder}\? Set it with"):
        locate(folder.with_name("qwens"))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"'llm.path': no folder [^ ]* nor [^ ]*\. Set it with llm.path=FOLDER"):
        locate(folder)
    with pytest.raises(ValueError, match=rf"The folder {tmp_path / 'none'} does not exist\. Set it with"):
        locate(tmp_path / "none" / "qwen")
    with pytest.raises(ValueError, match=r"'visual.path': no folder [^ ]* nor [^ ]*\. Set it with visual.path=FOLDER"):
        locate_backbone("trains", str(tmp_path / "none"), "visual.path")  # beside train.py


@pytest.mark.parametrize("name", ["x" * 300, "x" * 100_000])
def test_name_that_is_too_long(name):
    with pytest.raises(UserError, match=r"^'llm.path': ") as caught:
        locate_backbone(name, "models", "llm.path")
    assert len(str(caught.value)) < 600


class TestRememberedFolders:
    def found(self, path, run, tmp_path):
        return locate_backbone(path, str(tmp_path / "none"), "llm.path", run_folder=run)

    def test_by_its_bare_name(self, folder, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        moved = folder.rename(tmp_path / "vit-tiny")
        remember_backbones(run, moved.with_name("siglip"), moved)
        remember_backbones(run, moved.with_name("siglip"), moved)  # again, as a resumed run does
        assert [file.name for file in run.iterdir()] == ["backbones.json"]
        assert self.found("vit-tiny", run, tmp_path) == moved
        for other in ("qwens", str(tmp_path / "elsewhere" / "vit-tiny")):
            with pytest.raises(ValueError, match="no folder"):
                self.found(other, run, tmp_path)
        moved.rename(tmp_path / "gone")
        with pytest.raises(ValueError, match="no folder"):
            self.found("vit-tiny", run, tmp_path)

    def test_named_as_a_package_of_ours(self, folder, tmp_path):
        remember_backbones(tmp_path, folder, folder)
        assert self.found("qwen", tmp_path, tmp_path) == folder

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"llm.path": 3}'])
    def test_damaged_file_is_as_good_as_none(self, folder, tmp_path, text):
        (tmp_path / "backbones.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no folder"):
            self.found("vit-tiny", tmp_path, tmp_path)

    def test_folder_that_cannot_be_written(self, folder, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(UserError, match="backbones.json"):
            remember_backbones(tmp_path / "file", folder, folder)


def test_file_instead_of_folder(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; name the folder"):
        locate(folder / WEIGHTS)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'llm.path': .*qwen has no config\.json, so it is not a model folder"):
        locate(folder)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("text", "problem"), [('{"model_type": ', r"is not valid JSON .*"), ("[]", "has a list and not an object")]
)
def test_broken_config(folder, name, text, problem):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"'llm\.path': .*/{name} {problem}: copy it again"):
        locate(folder)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"the weights are missing in .*: it needs model\.safetensors, or its shards"):
        locate(folder)


def test_weights_under_another_name(folder):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"the weights are missing in .* \(found weights\.safetensors\)"):
        locate(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_truncated_safetensors(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"'llm.path': .*model\.safetensors is damaged or cut short .*: copy it again"):
        locate(folder)


def test_shards(folder):
    shard(folder)
    assert locate(folder) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'llm.path': model-00002-of-00002\.safetensors, a shard .* is missing"):
        locate(folder)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', "[]", '{"weight_map": []}'])
def test_index_that_is_no_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json is not a table of shards"):
        locate(folder)


def test_gguf(tmp_path):
    (tmp_path / "qwen2.5-0.5b-q4_k_m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "qwen2.5-0.5b-q4_k_m.gguf"):
        with pytest.raises(ValueError, match=r"holds GGUF, which is not read; get the original model, with config\.j"):
            locate(path)


@pytest.mark.parametrize(
    ("name", "method", "original"),
    [
        ("Qwen-7B-Chat-Int4", "gptq", "Qwen-7B-Chat"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int8", "gptq", "Qwen2.5-7B-Instruct"),
        ("Qwen2.5-7B-Instruct-AWQ", "awq", "Qwen2.5-7B-Instruct"),
    ],
)
def test_quantised(folder, name, method, original):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    quantised = folder.rename(folder.with_name(name))
    with pytest.raises(ValueError, match=rf"holds weights quantised with {method}, .* for example .*/{original}$"):
        locate(quantised)


def test_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-7B"}', encoding="utf-8")
    with pytest.raises(ValueError, match="is a LoRA adapter of Qwen/Qwen2.5-7B; name that model itself"):
        locate(folder)


@pytest.mark.parametrize("projector", ["feature_proj.safetensors", "other_params.bin"])  # ours, the report's
def test_trained_checkpoint(folder, projector):
    for name in ("adapter_config.json", projector):
        (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is a checkpoint of a trained model; give it with --checkpoint"):
        locate(folder)


class TestBin:
    def test_model_loads_and_has_a_fingerprint(self, backbones, tmp_path):
        for name in ("siglip", "qwen"):
            to_bin(shutil.copytree(backbones / name, tmp_path / name))
        model = MMultiModal.from_config(tiny_config(tmp_path))
        expected = MMultiModal.from_config(tiny_config(backbones))
        theirs = dict(expected.named_parameters())
        assert all(torch.equal(theirs[name], tensor) for name, tensor in model.named_parameters())
        before = backbone_fingerprint(tmp_path / "qwen")
        torch.save({"other": torch.zeros(1)}, tmp_path / "qwen" / "pytorch_model.bin")
        assert backbone_fingerprint(tmp_path / "qwen") != before

    @pytest.mark.parametrize("kept", [0, 10, 4000, -100])
    def test_truncated(self, folder, kept):
        to_bin(folder)
        file = folder / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (is damaged or cut short|holds more than tensors)"):
            locate(folder)

    @pytest.mark.parametrize("layout", ["zip", "plain pickle"])
    def test_malicious_pickle_does_nothing(self, folder, tmp_path, layout):
        (folder / WEIGHTS).unlink()
        victim = tmp_path / "written by the pickle"
        content = {"model.norm.weight": WritesFile(victim)}
        if layout == "zip":
            torch.save(content, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=r"'llm.path': .*pytorch_model\.bin holds more than tensors, .* run code"):
            locate(folder)
        assert not victim.exists()
