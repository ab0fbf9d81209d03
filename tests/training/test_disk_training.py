"""Training on records on the disk equals training on the same records in JSON, bit for bit."""

import json
from pathlib import Path

import pytest

from dataset.disk_writer import DiskRecords
from tests.training.runs import lines, same
from training.loop import Trainer

pytestmark = pytest.mark.usefixtures("whole_reports")


@pytest.fixture
def disk(workshop, tmp_path):
    """The data of `workshop` as `.sqlite`; the keys of their section in a config."""
    image_map, captions = (json.loads((workshop / f"{name}.json").read_text()) for name in ("image_map", "captions"))
    files = {name: tmp_path / f"{name}.sqlite" for name in ("image_map", "captions")}
    with DiskRecords(tmp_path) as records:
        for key, photo in image_map.items():
            records.add_photo(key, photo["path"], photo)
        for key, entries in captions.items():
            for entry in entries:
                records.add_entry(key, entry)
        records.write(*files.values(), {})
    return {name: str(file) for name, file in files.items()}


def trained(config, resume=None):
    """The last checkpoint, and the tokens of every batch."""
    trainer, seen = Trainer(config, resume), []
    forward = trainer.forward
    trainer.forward = lambda batch, count: seen.append(batch.input_ids.tolist()) or forward(batch, count)
    return trainer.run(), seen


SETTINGS = {
    "packed": {},
    "each answer": {"answers": "all"},
    "by tokens": {"tokens_per_batch": 200},
    "auto": {"micro_batch": "auto", "samples_per_step": 4},
    "cached": {"cache_features": True},
    "workers": {"workers": 1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_run_from_both_forms(configure, disk, tmp_path, kind):
    train = {"max_steps": 6, "eval_steps": 3, "log_steps": 1} | SETTINGS[kind]
    data = {"val_fraction": 0.3} | {key: train.pop(key) for key in ("answers", "cache_features") if key in train}
    runs = []
    for form in ({}, disk):
        folder = tmp_path / ("disk" if form else "json")
        runs.append(trained(configure(data=data | form, **train, output_dir=str(folder))))
    (json_folder, json_seen), (disk_folder, disk_seen) = runs
    assert json_seen == disk_seen
    assert same(json_folder, disk_folder)
    first, second = (
        [[line["loss"], line.get("val_loss")] for line in lines(folder.parent)] for folder in (json_folder, disk_folder)
    )
    assert first == second
    samples = [json.loads((Path(folder).parent / "samples.json").read_text()) for folder in (json_folder, disk_folder)]
    assert samples[0] == samples[1]


def test_a_run_resumes_on_the_disk(configure, disk, tmp_path):
    settings = {"max_steps": 6, "save_steps": 3}
    whole, _ = trained(configure(data=disk, **settings, output_dir=str(tmp_path / "whole")))
    broken = configure(data=disk, **settings, output_dir=str(tmp_path / "broken"))
    Trainer(broken).run()
    again, _ = trained(broken, resume=str(tmp_path / "broken" / "checkpoint-3"))
    assert same(whole, again)
