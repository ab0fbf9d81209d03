"""What a run changes, keeps, saves and takes up again."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from answering.answer import Answerer
from errors import UserError
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import list_checkpoints
from paths import REPO_ROOT
from tests.training.runs import losses, weights
from training import build, data
from training.data import epoch_order, micro_batches, sample_lengths
from training.dry_run import describe_run
from training.loop import Trainer
from training.optimizer import build_optimizer, build_schedule


def test_frozen_stays_frozen_and_the_rest_moves(configure):
    trainer = Trainer(configure(max_steps=2))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.run()
    for name, parameter in trainer.model.named_parameters():
        trained = name.startswith("feature_proj") or "lora_" in name
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, before[name]) != trained, name


@pytest.mark.parametrize("budget", [None, 300])
def test_resume_equals_uninterrupted(configure, tmp_path, budget):
    dropout = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}  # so that the random generator's state matters
    settings = {"log_steps": 1, "save_steps": 3, "save_total_limit": 9, "max_steps": 8, "tokens_per_batch": budget}
    whole = Trainer(configure(llm=dropout, output_dir=str(tmp_path / "whole"), **settings)).run()
    Trainer(configure(llm=dropout, output_dir=str(tmp_path / "parts"), **settings)).run()
    for step in (6, 8):  # what an interruption after step 3 (and some logged steps more) leaves behind
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}")
    (tmp_path / "parts" / "checkpoint-7.tmp").mkdir()
    torch.rand(5)
    resumed = Trainer(configure(llm=dropout, output_dir=str(tmp_path / "parts"), **settings), resume="auto")
    assert resumed.progress.step == 3
    parts = resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "parts")) == 8
    expected, actual = weights(whole), weights(parts)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_accumulation_equals_one_big_batch(configure, tmp_path):
    folders = []
    for micro_batch, accumulation in ((4, 1), (1, 4)):
        config = configure(
            output_dir=str(tmp_path / str(micro_batch)), micro_batch=micro_batch, accumulation=accumulation, max_steps=3
        )
        folders.append(Trainer(config).run())
    first, second = map(weights, folders)
    for name in first:  # float32 sums in another order, carried through three AdamW steps
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=2e-5, msg=name)


def test_packing_changes_neither_loss_nor_count(configure, tmp_path):
    results = []
    for pack in (True, False):
        config = configure(output_dir=str(tmp_path / str(pack)), pack_questions=pack, micro_batch=32, max_steps=1)
        trainer = Trainer(config)
        folder = trainer.run()
        results.append((losses(folder.parent)[1], trainer.last_figures["supervised_tokens"]))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)


def test_cached_features_train_the_same(configure, tmp_path):
    folders = []
    for cache in (False, True):
        config = configure(
            output_dir=str(tmp_path / str(cache)), max_steps=2, log_steps=1, data={"cache_features": cache}
        )
        folders.append(Trainer(config).run().parent)
    plain, cached = map(losses, folders)
    for step in plain:  # the cache holds bf16
        assert cached[step] == pytest.approx(plain[step], rel=2e-2)


def test_learns_by_heart_and_answers(configure, workshop, tmp_path):
    captions = json.loads((workshop / "captions.json").read_text())
    captions = {ID: entries[:1] for ID, entries in captions.items()}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    data = {"captions": str(tmp_path / "captions.json")}
    trainer = Trainer(configure(max_steps=400, micro_batch=7, log_steps=50, data=data))
    folder = trainer.run()
    assert trainer.last_figures["loss"] < 0.1  # the random encoder hardly tells two of the colours apart
    answerer = Answerer(load_checkpoint(folder, overrides={"model_root": trainer.config.model_root}))
    photos = trainer.train_set.photos
    asked = [answerer.answer(photos[ID].path, "Which colour?") for ID in range(4)]
    assert asked == ["red", "green", "blue", "white"]


def test_checkpoint_folder_is_self_describing(configure):
    folder = Trainer(configure(max_steps=1)).run()
    text = (folder / "config.yaml").read_text() + (folder / "adapter_config.json").read_text()
    assert "/tmp" not in text
    assert str(REPO_ROOT) not in text
    assert yaml.safe_load(text.split("\n{")[0])["llm"]["path"] == "qwen"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "config.yaml", "feature_proj.safetensors", "metrics.json",
        "provenance.json", "trainer_state",
    ]  # fmt: skip
    assert not list(folder.parent.glob("*.tmp"))


def test_old_checkpoints_go_and_a_second_run_does_not_overwrite(configure):
    config = configure(max_steps=6, save_steps=1, save_total_limit=2)
    folder = Trainer(config).run()
    assert [path.name for path in list_checkpoints(folder.parent)] == ["checkpoint-5", "checkpoint-6"]
    with pytest.raises(ValueError, match="already holds checkpoint-6: go on from it with --resume auto"):
        Trainer(config)


def test_init_from_starts_with_the_weights_of_a_checkpoint(configure, tmp_path):
    first = Trainer(configure(max_steps=2)).run()
    second = Trainer(configure(output_dir=str(tmp_path / "second"), init_from=str(first), max_steps=2))
    assert second.progress.step == 0
    expected = load_file(first / "feature_proj.safetensors")
    assert all(torch.equal(second.model.feature_proj.state_dict()[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="'llm.lora' differs from the adapter"):
        Trainer(configure(output_dir=str(tmp_path / "third"), init_from=str(first), llm={"lora": {"r": 2, "alpha": 8}}))


def break_photos(workshop, tmp_path, *IDs):
    image_map = json.loads((workshop / "image_map.json").read_text())
    for ID in IDs:
        broken = tmp_path / f"broken-{ID}.png"
        broken.write_bytes((workshop / "photos" / f"{ID}.png").read_bytes()[:60])
        image_map[f"photos/{ID}.png"]["path"] = str(broken)
    (tmp_path / "image_map.json").write_text(json.dumps(image_map))
    return {"image_map": str(tmp_path / "image_map.json")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_turned_bad_is_replaced_counted_and_named(configure, tmp_path, workshop, capsys, workers):
    config = configure(
        max_steps=8, micro_batch=1, workers=workers, log_steps=1, data=break_photos(workshop, tmp_path, 3)
    )
    folder = Trainer(config).run()
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["replaced_photos"] == 1
    assert capsys.readouterr().out.count("broken-3.png: damaged") == 1  # once, however often it is drawn
    again = Trainer(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 9})}), "auto")
    assert len(again.progress.unreadable) == 1


def test_too_many_bad_photos_end_the_run_with_a_checkpoint(configure, tmp_path, workshop):
    config = configure(max_steps=50, micro_batch=1, workers=1, data=break_photos(workshop, tmp_path, 1, 3))
    trainer = Trainer(config)
    with pytest.raises(UserError, match=r"2 photos of \d training samples cannot be read.*broken-\d\.png") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert trainer.progress.step
    assert list_checkpoints(trainer.output_dir)[-1].name == f"checkpoint-{trainer.progress.step}"


def test_missing_record_files_say_what_to_run(configure, tmp_path):
    with pytest.raises(ValueError, match=r"'data.captions'.*not found: make it with python process_image.py"):
        Trainer(configure(data={"captions": str(tmp_path / "captions.json")}))


def test_groups_and_schedule(configure):
    trainer = Trainer(configure(weight_decay=0.1, warmup_ratio=0.5, max_steps=10, projector_lr=1e-3, lora_lr=1e-4))
    optimizer = build_optimizer(trainer.model, trainer.config.train)
    described = {(group["name"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert described == {("projector", 0.1): 2, ("projector", 0.0): 2, ("lora", 0.1): 28}
    schedule = build_schedule(optimizer, trainer.config.train, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[5] == pytest.approx(1e-3)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[-1] < 1.2e-4


def test_order_visits_every_sample_once_and_weights_repeat(configure):
    dataset = Trainer(configure()).train_set
    order = epoch_order(dataset, {}, seed=0, epoch=0)
    assert sorted(order) == list(range(len(dataset)))
    assert order != epoch_order(dataset, {}, seed=0, epoch=1)
    assert order == epoch_order(dataset, {}, seed=0, epoch=0)
    weighted = epoch_order(dataset, {"tiny": 1.5}, seed=0, epoch=0)
    assert len(weighted) == len(dataset) + round(len(dataset) / 2)
    assert [len(batch) for batch in micro_batches(list(range(7)), 2, 1)] == [2, 2, 2, 1]
    assert [len(batch) for batch in micro_batches(list(range(7)), 2, 3)] == [2, 2, 2]


def test_token_budget_fills_micro_batches_and_keeps_the_order(configure, monkeypatch):
    lengths = [5, 4, 3, 30, 1, 9, 10]
    assert list(micro_batches([6, 0, 1, 3, 2, 4, 5], 1, 1, lengths, tokens=10)) == [[6], [0, 1], [3], [2, 4], [5]]
    assert list(micro_batches([6, 0, 1, 3, 2, 4, 5], 1, 2, lengths, tokens=10)) == [[6], [0, 1], [3], [2, 4]]
    trainer = Trainer(configure(tokens_per_batch=300, workers=1))
    lengths = [len(trainer.train_set.tokens(index).input_ids) for index in range(len(trainer.train_set))]
    assert list(sample_lengths(trainer.train_set, workers=1)) == lengths
    monkeypatch.setattr(data, "FEW_SAMPLES", 1)
    assert list(sample_lengths(trainer.train_set, workers=1)) == lengths
    some = [0 if index == 1 else length for index, length in enumerate(lengths)]
    chosen = [index for index in range(len(lengths)) if index != 1]
    assert list(sample_lengths(trainer.train_set, 1, chosen[::-1])) == some
    batches = trainer.epoch_batches(0, 0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) > 1
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= 300 for batch in batches)
    assert list(batches) == list(trainer.epoch_batches(0, 0)) != list(trainer.epoch_batches(1, 0))


def test_tokens_are_counted_once_an_epoch(configure, monkeypatch):
    counted = []

    def noting(dataset, workers, indices=None, stop=None):
        counted.append(len(dataset) if indices is None else len(indices))
        return sample_lengths(dataset, workers, indices, stop)

    monkeypatch.setattr(build, "sample_lengths", noting)
    settings = {"tokens_per_batch": 300, "eval_steps": 1, "max_steps": None, "epochs": 2, "eval_samples": 1}
    trainer = Trainer(configure(data={"val_fraction": 0.4}, **settings))
    trainer.run()
    assert counted.count(len(trainer.train_set)) == 2
    assert counted.count(1) == trainer.total_steps  # the validation sample before each validation
    assert len(counted) == 2 + trainer.total_steps


@pytest.mark.nightly  # compiling takes half a minute
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_the_same(configure, tmp_path, checkpointing):
    plain, compiled = (
        Trainer(
            configure(
                output_dir=str(tmp_path / str(compile)),
                compile=compile,
                gradient_checkpointing=checkpointing,
                log_steps=1,
                max_steps=4,
            )
        ).run()
        for compile in (False, True)
    )
    expected, actual = losses(plain.parent), losses(compiled.parent)
    for step in expected:
        assert actual[step] == pytest.approx(expected[step], rel=1e-4)


def test_dry_run_describes_and_keeps_nothing(configure):
    trainer = Trainer(configure())
    text = describe_run(trainer)
    assert "projector 1,856" in text
    assert "questions per sample" in text
    assert "micro_batch × accumulation" in text
    assert not trainer.output_dir.exists()


def test_dry_run_with_a_token_budget(configure):
    trainer = Trainer(configure(tokens_per_batch=400))
    text = describe_run(trainer)
    assert f"an optimizer step of {trainer.setting.accumulation} × 400 tokens on each process" in text
    assert f" 400 tokens × {trainer.setting.accumulation} " in text
    assert trainer.estimate.most_tokens(64) == max(400, trainer.estimate.longest)


TWO_PROCESSES = """
import sys
from config import Config
from training.loop import Trainer
Trainer(Config.model_validate_json(open(sys.argv[1]).read())).run()
"""


@pytest.mark.nightly  # a minute; test_processes.py compares norms of more cases, this one every weight
def test_two_processes_equal_one(configure, tmp_path):
    """gloo, two processes; one draws only text in some steps."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    folders = []
    for processes in (1, 2):
        output = tmp_path / f"run-{processes}"
        config = configure(
            output_dir=str(output),
            micro_batch=1,
            accumulation=2 // processes,
            max_steps=3,
            log_steps=1,
            max_questions=2,
        )
        (tmp_path / "config.json").write_text(config.model_dump_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        result = subprocess.run(
            [*command, str(script), str(tmp_path / "config.json")],
            cwd=REPO_ROOT,
            env={"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        folders.append(output)
    one, two = (weights(folder / "checkpoint-3") for folder in folders)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5, msg=name)
    first, second = map(losses, folders)
    for step in first:
        assert second[step] == pytest.approx(first[step], rel=1e-4)
