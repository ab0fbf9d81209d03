"""What a resumed or second run may change, the end of an epoch, and the gradient scaler of fp16."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from errors import UserError
from paths import REPO_ROOT
from tests.training.runs import at_step, lines, names, same
from training import build, folder_lock, loop
from training.checks import MOST_SKIPPED, NonFiniteError
from training.dry_run import describe_run
from training.loop import Trainer


def test_learning_rates_of_the_config_hold_after_a_resumption(config, tmp_path):
    """Also because the sentence about a non-finite loss advises to lower them."""
    Trainer(config(max_steps=8, warmup_ratio=0.0)).run()
    for number in range(3, 9):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{number}")
    changed = config(max_steps=8, warmup_ratio=0.0, projector_lr=1e-4, weight_decay=0.5, betas=(0.8, 0.9))
    trainer = Trainer(changed, resume="auto")
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.5}
    assert {tuple(group["betas"]) for group in trainer.optimizer.param_groups} == {(0.8, 0.9)}
    trainer.run()
    logged = lines(tmp_path / "run")
    factors = [line["lora_lr"] / 1e-2 for line in logged]
    assert factors[2:] == pytest.approx([line["projector_lr"] / 1e-4 for line in logged[2:]])


def test_more_epochs_after_the_last_step(config, tmp_path):
    settings = {"max_steps": None, "micro_batch": 4, "max_questions": 1}
    first = Trainer(config(epochs=1, **settings))
    first.run()
    assert len(lines(tmp_path / "run")) == first.steps_per_epoch
    Trainer(config(epochs=2, **settings), resume="auto").run()
    logged = lines(tmp_path / "run")
    assert len(logged) == 2 * first.steps_per_epoch
    assert logged[-1]["epoch"] == 2
    # the first new step learns, though the rate of the old schedule had come to nothing
    assert logged[first.steps_per_epoch]["projector_lr"] > logged[-1]["projector_lr"]


def test_at_the_end_of_an_epoch(config, tmp_path):
    settings = {"max_steps": None, "epochs": 2, "micro_batch": 4, "max_questions": 1}
    whole = Trainer(config("whole", **settings)).run()
    trainer = Trainer(config(**settings))
    trainer.run()
    for number in range(trainer.steps_per_epoch + 1, trainer.total_steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{number}")
    resumed = Trainer(config(**settings), resume="auto")
    assert (resumed.progress.epoch, resumed.progress.samples) == (1, 0)
    assert same(resumed.run(), whole)
    again = Trainer(config(**settings), resume="auto")
    assert again.run() == tmp_path / "run" / whole.name  # nothing is left to do
    assert lines(tmp_path / "run")[-1]["epoch"] == 2


def test_smaller_steps_end_with_the_epoch_all_the_same(config, tmp_path):
    """`train.micro_batch=1` after a lack of memory, without more accumulation."""
    settings = {"max_steps": None, "epochs": 1, "max_questions": 1}
    trainer = Trainer(config(micro_batch=4, **settings))
    at_step(trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run()
    smaller = config(micro_batch=1, **settings)
    resumed = Trainer(smaller, resume="auto")
    left = len(resumed.train_set) - resumed.progress.samples
    assert resumed.total_steps == 3 + left
    at_step(resumed, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        resumed.run()
    last = Trainer(smaller, resume="auto")
    assert last.total_steps == 3 + left
    last.run()
    assert lines(tmp_path / "run")[-1]["epoch"] == 1


def test_a_folder_of_an_odd_name_is_no_checkpoint(config, tmp_path):
    Trainer(config(max_steps=1)).run()
    (tmp_path / "run" / "checkpoint-²").mkdir()
    assert Trainer(config(), resume="auto").progress.step == 1


def test_an_accepted_prompt_is_taken(config, tmp_path):
    Trainer(config()).run()
    other = config(prompt={"system": "Answer briefly."}, max_steps=5)
    with pytest.raises(UserError, match=r"belongs to another run: prompt was .*--accept-changes"):
        Trainer(other, resume="auto")
    assert Trainer(other, resume="auto", accept_changes=True).run().name == "checkpoint-5"
    assert Trainer(other, resume="auto").progress.step == 5


def test_a_first_stage_of_the_projector_fits_any_lora(config, capsys):
    first = Trainer(config("first", lora_lr=0)).run()
    other = {"prompt": {"system": "Answer briefly."}, "llm": {"lora": {"r": 2, "alpha": 8, "dropout": 0.0}}}
    capsys.readouterr()
    second = Trainer(config("second", init_from=str(first), **other))
    said = capsys.readouterr().out
    assert f"'lora' was never trained in {first} and begins anew" in said
    assert f"{first} was trained with another prompt than this run's" in said
    own = second.model.feature_proj.state_dict()
    expected = load_file(first / "feature_proj.safetensors")
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    third = second.run()
    with pytest.raises(UserError, match=r"'llm.lora' differs from the adapter .*r=2"):  # that one was trained
        Trainer(config("third", init_from=str(third), prompt=other["prompt"]))


def test_other_rows_of_the_photo_are_a_note_for_a_new_run(config, capsys):
    first = Trainer(config("first")).run()
    other = config("second", init_from=str(first))
    other = other.model_copy(update={"visual": other.visual.model_copy(update={"drop": "none"})})
    capsys.readouterr()
    Trainer(other)
    said = capsys.readouterr().out
    assert f"{first} was trained with visual.drop=first, and training will adapt it to none" in said
    assert "another prompt" not in said
    other = other.model_copy(update={"train": other.train.model_copy(update={"output_dir": str(first.parent)})})
    with pytest.raises(UserError, match=r"was trained with visual\.drop=first: set it so"):
        Trainer(other, resume="auto")


def test_other_samples_change_the_number_of_steps(config):
    settings = {"max_steps": None, "epochs": 1, "micro_batch": 1}
    trainer = Trainer(config(**settings))
    at_step(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run()
    apart = config(pack_questions=False, **settings)
    resumed = Trainer(apart, resume="auto", accept_changes=True)
    assert trainer.total_steps < resumed.total_steps == 2 + len(resumed.train_set) - resumed.progress.samples
    resumed.run()
    assert Trainer(apart, resume="auto").total_steps == resumed.total_steps


def test_figures_of_the_validation_outlive_a_resumption(config):
    trainer = Trainer(config(data={"val_fraction": 0.4}, eval_steps=2, max_steps=5))
    at_step(trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run()
    resumed = Trainer(config(data={"val_fraction": 0.4}, eval_steps=4, max_steps=5), resume="auto")
    kept = resumed.last_figures["val_loss"]
    at_step(resumed, 4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        resumed.run()
    saved = orjson.loads((resumed.output_dir / "checkpoint-4" / "metrics.json").read_bytes())
    assert (saved["step"], saved["val_loss"]) == (4, kept)


def test_a_signal_in_the_last_step_leaves_out_no_validation(config, tmp_path):
    trainer = Trainer(config(data={"val_fraction": 0.4}))
    at_step(trainer, 4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run()
    assert lines(tmp_path / "run")[-1]["val_loss"] > 0
    assert names(tmp_path / "run")[-1] == "checkpoint-4"


# fp16's scaler, with a scale that overflows


@pytest.fixture
def scaled(monkeypatch):
    """`scaled(scale)`: from now on, runs have a gradient scaler that begins with that scale."""

    def use(scale, growth=2000):
        make = build.make_accelerator

        def make_accelerator(config):
            accelerator, precision = make(config)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
            clip = torch.nn.utils.clip_grad_norm_

            def clip_grad_norm(parameters, longest):  # accelerate's own unscales for fp16 only
                accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
                return clip(parameters, longest)

            accelerator.clip_grad_norm_ = clip_grad_norm
            return accelerator, precision

        monkeypatch.setattr(build, "make_accelerator", make_accelerator)

    return use


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_until_its_scale_fits(config, scaled, monkeypatch, fused):
    if fused:  # a fused optimizer, as on a GPU, skips in its own kernel, and accelerate takes the step for a whole one
        monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", False)
    scaled(2.0**126)  # more than the backward pass can take in float32
    trainer = Trainer(config(max_steps=40, save_steps=10))
    start = {name: parameter.clone() for name, parameter in trainer.model.feature_proj.named_parameters()}
    seen = []
    after = loop.after_step

    def noting(run, watch, figures):
        moved = any(not torch.equal(start[name], own) for name, own in trainer.model.feature_proj.named_parameters())
        seen.append((trainer.progress.skipped, moved))
        return after(run, watch, figures)

    monkeypatch.setattr(loop, "after_step", noting)
    trainer.run()
    count = [moved for _, moved in seen].index(True)
    assert count > 1
    assert seen == [(number, False) for number in range(1, count + 1)] + [(0, True)] * (40 - count)
    scale = trainer.accelerator.scaler.get_scale()
    assert scale == 2.0 ** (126 - count)
    assert trainer.schedule.last_epoch == 40 - count
    assert Trainer(config(max_steps=41), resume="auto").accelerator.scaler.get_scale() == scale


def test_a_scaler_that_skips_for_ever_stops_the_run(config, tmp_path, scaled):
    scaled(1.0)
    trainer = Trainer(config(max_steps=99, save_steps=100))
    forward = trainer.forward
    trainer.forward = lambda *given: forward(*given) + (trainer.model.feature_proj[0].weight * 0).sum().abs().sqrt()
    with pytest.raises(NonFiniteError, match=rf"the gradient became nan at step {MOST_SKIPPED};"):
        trainer.run()
    assert names(tmp_path / "run") == []


LOCKED = "'train.output_dir': a run is training in .*: wait for its end, or set another train.output_dir"
HOLDER = """
import sys, time
from pathlib import Path
from training.folder_lock import folder_lock
lock = folder_lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_which_a_run_is_training_is_refused(config, monkeypatch):
    monkeypatch.setattr(folder_lock, "WAIT", 0.1)
    settings = config(max_steps=1)
    folder = Path(settings.train.output_dir)
    half_written = folder / "checkpoint-1.tmp"
    half_written.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (None, "auto"):
            with pytest.raises(UserError, match=LOCKED):
                Trainer(settings, resume)
        assert half_written.is_dir()  # it may be the checkpoint that the other run is just writing
        describe_run(Trainer(settings, dry_run=True))
        other.kill()
    Trainer(settings).run()
    assert not half_written.exists()


def test_a_run_holds_its_folder_until_it_ends(config, monkeypatch):
    monkeypatch.setattr(folder_lock, "WAIT", 0.1)
    settings = config(max_steps=1)
    first, second = Trainer(settings), Trainer(settings)  # neither had a checkpoint when the other was built
    forward = first.forward

    def asking(*arguments):
        with pytest.raises(UserError, match=LOCKED):
            second.run()
        return forward(*arguments)

    monkeypatch.setattr(first, "forward", asking)
    folder = first.run()
    assert sorted(path.name for path in folder.parent.glob("checkpoint-*")) == ["checkpoint-1"]
    assert folder_lock.folder_lock(folder.parent).acquire()
