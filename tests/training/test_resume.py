"""What may be resumed: sound checkpoints of the same run, however its steps are cut."""

import json
import shutil
import subprocess

import orjson
import pytest
import torch

from errors import UserError
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import STATE_FILE, read_provenance
from training import build, loop
from training.loop import Trainer

DAMAGE = {
    "state is missing": lambda folder: (folder / STATE_FILE).unlink(),
    "state is cut": lambda folder: cut(folder / STATE_FILE),
    "state is empty": lambda folder: (folder / STATE_FILE).write_bytes(b""),
    "state is hostile": lambda folder: torch.save(subprocess.run, folder / STATE_FILE),
    "adapter is cut": lambda folder: cut(folder / "adapter_model.safetensors"),
    "adapter is missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "projector has one other byte": lambda folder: flip(folder / "feature_proj.safetensors"),
    "provenance is half": lambda folder: (folder / "provenance.json").write_text("{"),
    "provenance is empty": lambda folder: (folder / "provenance.json").write_text("{}"),
    "adapter_config is empty": lambda folder: (folder / "adapter_config.json").write_text(""),
    "config is binary": lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"),
}


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_offered(config, whole, kind):
    DAMAGE[kind](whole / "checkpoint-4")
    with pytest.raises(UserError) as caught:
        Trainer(config("whole"), resume="auto")
    message = str(caught.value)
    assert kind.split()[0] in message.replace("feature_proj", "projector").replace(STATE_FILE, "state")
    sound = whole / "checkpoint-3"
    assert f"{sound} is sound: resume it with --resume {sound}" in message
    assert Trainer(config("whole"), resume=str(sound)).progress.step == 3


def test_a_flipped_byte_is_refused_for_answering(config, whole):
    flip(whole / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: adapter_model.safetensors is not what was written"):
        load_checkpoint(whole / "checkpoint-4", overrides={"model_root": config().model_root})


def test_the_order_of_samples_survives_another_micro_batch(config, tmp_path, monkeypatch):
    """After out of memory: what our own sentence advises, with the samples that were due."""
    seen = []
    inner = loop.optimizer_step

    def noting(run, batches, indices, *rest):
        seen.append([index for batch in indices for index in batch])
        return inner(run, batches, indices, *rest)

    monkeypatch.setattr("training.loop.optimizer_step", noting)
    settings = {"micro_batch": 4, "save_steps": 2, "max_steps": 6, "max_questions": 1}
    Trainer(config(**settings)).run()
    expected, seen[:] = list(seen), []
    for folder in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "run" / folder)
    lean = settings | {"micro_batch": 1, "accumulation": 4, "gradient_checkpointing": "on"}
    resumed = Trainer(config(**lean), resume="auto")
    assert resumed.setting == build.Setting(1, 4, True)
    resumed.run()
    assert seen == expected[2:]


CHANGES = {
    "data.val_fraction was 0.0 and is 0.4": {"data": {"val_fraction": 0.4}},
    "data.seed was 0 and is 5": {"data": {"seed": 5}},
    "data.max_length was 2048 and is 999": {"data": {"max_length": 999}},
    "train.seed was 0 and is 5": {"seed": 5},
    "train.max_questions was 16 and is 1": {"pack_questions": False},
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_another_run_is_refused_unless_it_is_accepted(config, whole, sentence):
    changed = config("whole", max_steps=5, **CHANGES[sentence])
    with pytest.raises(UserError, match=f"checkpoint-4 belongs to another run: {sentence}.*--accept-changes"):
        Trainer(changed, resume="auto")
    folder = Trainer(changed, resume="auto", accept_changes=True).run()
    (accepted,) = read_provenance(folder)["accepted_changes"]
    key, _, values = sentence.partition(" was ")
    assert accepted["checkpoint"] == "checkpoint-4"
    assert [str(value) for value in accepted["changes"][key]] == values.split(" and is ")
    again = Trainer(config("whole", **{"max_steps": 6} | CHANGES[sentence]), resume="auto")
    assert again.provenance["accepted_changes"] == [accepted]


def test_other_data_are_refused(config, whole, workshop, tmp_path):
    captions = json.loads((workshop / "captions.json").read_text())
    captions["0"] = captions["0"][:1]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(UserError, match="belongs to another run: data was '.*' and is '"):
        Trainer(config("whole", data={"captions": str(tmp_path / "captions.json")}), resume="auto")


def test_formats_of_other_versions(config, whole):
    file = whole / "checkpoint-4" / "provenance.json"
    provenance = orjson.loads(file.read_bytes())
    file.write_bytes(orjson.dumps(provenance | {"format_version": 99}))
    with pytest.raises(UserError, match=r"checkpoint-4 has format version 99, this code reads up to 3: update"):
        load_checkpoint(whole / "checkpoint-4")
    old = {key: value for key, value in provenance.items() if key not in ("format_version", "checksums", "shape")}
    file.write_bytes(orjson.dumps(old))
    with pytest.raises(UserError, match=r"earlier version.*cannot be resumed.*start from them with train.init_from="):
        Trainer(config("whole"), resume="auto")
    load_checkpoint(whole / "checkpoint-4", overrides={"model_root": config().model_root})


def test_resuming_into_the_folder_of_another_run_is_refused(config, whole):
    Trainer(config("other", max_steps=1)).run()
    with pytest.raises(UserError, match="is not a checkpoint of 'train.output_dir'"):
        Trainer(config("other"), resume=str(whole / "checkpoint-2"))
