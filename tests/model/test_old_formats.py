"""Checkpoints of earlier formats load, answer and resume as they did; see `FORMAT_VERSION`."""

import json
import shutil

import pytest
import torch
import yaml

from answering.answer import Answerer
from errors import UserError
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import read_config
from tests.tiny import tiny_config
from tests.training.runs import losses, same
from training.loop import Trainer

QUESTIONS = ["Which colour?", "Which number?", "Is it red?", "Say hello.", "Why?"]


def configured(backbones, output, drop="first", lora_rate=1e-2, **projector):
    settings = {"output_dir": str(output), "save_steps": 2, "log_steps": 1, "trackers": []}
    return tiny_config(
        backbones,
        visual={"path": str(backbones / "siglip"), "drop": drop},
        llm={"path": str(backbones / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
        projector=projector,
        train=settings | {"projector_lr": 2e-2, "lora_lr": lora_rate},
    ).model_copy(update={"model_root": str(backbones)})


def turn_back(folder, version):
    """Rewrite a checkpoint as the code wrote it when this was the format's version."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    visual, train, parts = config["visual"], config["train"], config["train"].pop("parts")
    for key in ("tiles", "lora"):  # of what came with version 3
        del visual[key]
    for key in ("kind", "factor", "mean_share", "queries", "heads"):
        del config["projector"][key]
    del config["data"]["augment"]
    visual["drop_first_token"] = {"first": True, "none": False}[visual.pop("drop")]
    train |= {"projector_lr": parts["projector"]["lr"], "lora_lr": parts["llm"]["lr"], "attention": "sdpa"}
    file.write_text(yaml.safe_dump(config))
    file = folder / "provenance.json"
    provenance = json.loads(file.read_text()) | {"format_version": version}
    if version == 1:
        del provenance["checksums"], provenance["format_version"]
    file.write_text(json.dumps(provenance))


def answers(folder, backbones, photo):
    answerer = Answerer(load_checkpoint(folder, overrides={"model_root": str(backbones)}))
    return [answerer.answer(photo, question) for question in QUESTIONS]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("drop", "before"), [("first", True), ("none", False)])
def test_answers_as_before(backbones, tmp_path, caplog, version, drop, before):
    trainer = Trainer(configured(backbones, tmp_path / "run", drop))
    folder, photo = trainer.run(), trainer.train_set.photos[0].path
    expected = answers(folder, backbones, photo)
    assert len(set(expected)) > 1
    assert "is called" not in caplog.text
    turn_back(folder, version)
    assert answers(folder, backbones, photo) == expected
    for old, new, value in (
        ("visual.drop_first_token", "visual.drop", drop),
        ("train.projector_lr", "train.parts.projector.lr", 0.02),
        ("train.lora_lr", "train.parts.llm.lr", 0.01),
    ):
        assert f"{folder}/config.yaml: '{old}' is called '{new}' now and means {value}" in caplog.text
    assert yaml.safe_load((folder / "config.yaml").read_text())["visual"]["drop_first_token"] is before  # untouched
    if version == 1:
        with pytest.raises(UserError, match=r"earlier version.*start from them with train.init_from="):
            Trainer(configured(backbones, tmp_path / "run", drop), resume="auto")


@pytest.mark.parametrize("lora_rate", [1e-2, 0.0])
def test_version_2_resumes_bit_by_bit(backbones, tmp_path, lora_rate):
    whole = Trainer(configured(backbones, tmp_path / "whole", lora_rate=lora_rate)).run()
    shutil.copytree(whole.parent / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    turn_back(tmp_path / "part" / "checkpoint-2", 2)
    resumed = Trainer(configured(backbones, tmp_path / "part", lora_rate=lora_rate), resume="auto")
    assert resumed.progress.step == 2
    folder = resumed.run()
    assert same(folder, whole)
    curve = losses(whole.parent)
    assert losses(tmp_path / "part") == {step: curve[step] for step in (3, 4)}
    states = [torch.load(path / "trainer_state" / "state.pt", weights_only=True) for path in (folder, whole)]
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]


def test_joined_patches_without_the_later_key_answer_as_before(backbones, tmp_path):
    """A checkpoint of `pixel_shuffle` from before `projector.mean_share` was trained with none of the mean."""
    shuffle = {"kind": "pixel_shuffle", "factor": 2, "mean_share": 0.0}
    trainer = Trainer(configured(backbones, tmp_path / "run", **shuffle))
    folder, photo = trainer.run(), trainer.train_set.photos[0].path
    expected = answers(folder, backbones, photo)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["projector"]["mean_share"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_config(folder).projector.mean_share == 0
    assert answers(folder, backbones, photo) == expected
    assert read_config(folder, {"projector.mean_share": 0.5}).projector.mean_share == 0.5
