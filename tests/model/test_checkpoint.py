"""Save → load gives the same model; a folder that is not whole, or meant for another backbone, is refused."""

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from backbones.backbone import _first_fingerprint, remember_backbones
from errors import UserError
from model.checkpoint import load_checkpoint, save_checkpoint
from model.checkpoint_folder import list_checkpoints, recover
from model.model import MMultiModal
from model.portable import portable_config
from tests.tiny import IMAGE_SIZE, fill_trained, tiny_config, write_qwen


@pytest.fixture(scope="module")
def model(backbones):
    model = MMultiModal.from_config(tiny_config(backbones)).eval()
    fill_trained(model)
    return model


@pytest.fixture
def folder(model, tmp_path):
    save_checkpoint(model, tmp_path / "checkpoint-1", {"loss": 1.0}, {"commit": None}, {})
    return tmp_path / "checkpoint-1"


def load(folder, backbones, **overrides):
    return load_checkpoint(folder, overrides={"model_root": backbones} | overrides, merge_lora=False)


@torch.no_grad()
def test_same_logits_after_loading(model, folder, backbones):
    loaded = load(folder, backbones)
    assert not loaded.training
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question("What?", 1)])[0]])
    assert torch.equal(loaded(pixels, ids).logits, model(pixels, ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_adapter_loads_with_peft_alone(model, folder, backbones):
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbones / "qwen"), folder)
    own = {name: tensor for name, tensor in model.LLM.named_parameters() if "lora_" in name}
    theirs = dict(adapter.named_parameters())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in own.items())


def test_paths_in_a_checkpoint_are_portable(backbones):
    config = tiny_config(backbones)
    raw = json.dumps(portable_config(config))
    assert str(backbones) not in raw
    assert portable_config(config)["visual"]["path"] == "siglip"
    for home in ("~nobody-has-this-name/siglip", "~/siglip"):  # the first is no absolute path
        config.visual.path = home
        assert portable_config(config)["visual"]["path"] == (home if "nobody" in home else "siglip")


@pytest.mark.parametrize("name", ["feature_proj.safetensors", "config.yaml", "adapter_model.safetensors"])
def test_incomplete_folder(folder, backbones, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"not a complete checkpoint, it lacks {name}"):
        load(folder, backbones)


def test_wrong_folder_names_the_right_one(folder, backbones):
    with pytest.raises(ValueError, match=r"did you mean .*checkpoint-1\?"):
        load(folder.parent, backbones)
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-2000.tmp", "checkpoint-950.old"):
        (folder.parent / name).mkdir()
    with pytest.raises(ValueError, match=r"did you mean .*checkpoint-1000\?"):
        load(folder.parent, backbones)
    with pytest.raises(ValueError, match=r"checkpoint folder not found: .*Did you mean .*checkpoint-1\?"):
        load(folder.with_name("checkpoint-2"), backbones)


def test_other_backbone_is_refused(folder, backbones, tmp_path):
    torch.manual_seed(9)
    other = write_qwen(tmp_path / "other", initializer_range=0.1)
    with pytest.raises(ValueError, match=r"was trained on another 'llm.path'.*Set llm.path=FOLDER"):
        load(folder, backbones, **{"llm.path": other})


def test_checkpoint_with_fingerprints_of_the_older_form(folder, backbones, caplog):
    provenance = json.loads((folder / "provenance.json").read_text())
    for part, name in (("visual", "siglip"), ("llm", "qwen")):
        provenance["fingerprints"][part] = _first_fingerprint(backbones / name)
    (folder / "provenance.json").write_text(json.dumps(provenance))
    load(folder, backbones)
    assert caplog.text.count("an older form") == 2
    provenance["fingerprints"]["llm"] = "0" * 16
    (folder / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ValueError, match="was trained on another 'llm.path'"):
        load(folder, backbones)


def test_backbones_are_found_where_the_run_had_them(model, folder):
    with pytest.raises(ValueError, match="'visual.path': no folder"):
        load_checkpoint(folder, overrides={"model_root": folder})
    remember_backbones(folder.parent, model.visual_folder, model.llm_folder)
    loaded = load_checkpoint(folder, overrides={"model_root": folder})
    assert (loaded.visual_folder, loaded.llm_folder) == (model.visual_folder, model.llm_folder)
    assert not any(str(model.llm_folder) in file.read_text(errors="replace") for file in folder.rglob("*.*"))


def test_missing_backbone_says_which_key(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'visual.path': no folder .*Set it with visual.path=FOLDER"):
        load_checkpoint(folder, overrides={"model_root": tmp_path / "empty"})


def test_changed_prompt_is_refused(folder, backbones):
    with pytest.raises(ValueError, match=r"trained with another prompt: leave prompt\.\* as"):
        load(folder, backbones, **{"prompt.system": "Other."})


@pytest.mark.parametrize(
    ("projector", "changed", "said"),
    [
        ({"kind": "resampler", "queries": 5, "heads": 4}, {"projector.heads": 2}, "projector.heads=4"),
        ({"kind": "pixel_shuffle", "factor": 2, "mean_share": 0.0}, {"projector.mean_share": None}, "mean_share=0.0"),
        ({"kind": "pixel_shuffle", "factor": 2}, {"visual.drop": "none"}, "visual.drop=first"),
        ({}, {"visual.drop": "none"}, "visual.drop=first"),
    ],
)
def test_settings_that_change_no_shape_are_compared(backbones, tmp_path, projector, changed, said):
    model = MMultiModal.from_config(tiny_config(backbones, projector=projector))
    save_checkpoint(model, tmp_path / "checkpoint-1", {}, {"commit": None}, {})
    load(tmp_path / "checkpoint-1", backbones)
    load(tmp_path / "checkpoint-1", backbones, **{"projector.dropout": 0.5})
    with pytest.raises(UserError, match=rf"was trained with .*{said}: set it so"):
        load(tmp_path / "checkpoint-1", backbones, **changed)


def test_the_default_share_of_the_mean_is_equal_to_its_number(backbones, tmp_path):
    model = MMultiModal.from_config(tiny_config(backbones, projector={"kind": "pixel_shuffle", "factor": 2}))
    save_checkpoint(model, tmp_path / "checkpoint-1", {}, {"commit": None}, {})
    load(tmp_path / "checkpoint-1", backbones, **{"projector.mean_share": 0.5})


def test_projector_of_another_size_is_refused(folder, backbones):
    tensors = load_file(folder / "feature_proj.safetensors")
    save_file({name: tensor[:4].contiguous() for name, tensor in tensors.items()}, folder / "feature_proj.safetensors")
    with pytest.raises(ValueError, match=r"feature_proj\.safetensors does not fit"):
        load(folder, backbones)


def test_adapter_that_lacks_a_layer_is_refused(folder, backbones):
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model"):
        load(folder, backbones)


def test_unfinished_folder_is_no_checkpoint(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-11.tmp", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_a_failure_while_saving_keeps_the_old_checkpoint(model, folder, backbones):
    before = (folder / "feature_proj.safetensors").read_bytes()
    with pytest.raises((AttributeError, TypeError)):  # a defect: what cannot be pickled
        save_checkpoint(model, folder, {}, {}, {"state": lambda: None})
    assert (folder / "feature_proj.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    load(folder, backbones)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_replacing_a_checkpoint_can_be_cut_off_between_any_two_renames(model, folder, monkeypatch, fails_at):
    before = (folder / "metrics.json").read_bytes()
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(source)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, folder, {"loss": 2.0}, {"commit": None}, {})
    monkeypatch.undo()
    recover(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "metrics.json").read_bytes() == before
    save_checkpoint(model, folder, {"loss": 2.0}, {"commit": None}, {})
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "metrics.json").read_bytes() != before
