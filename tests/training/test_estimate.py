"""Will it fit: what `auto` chooses, what the dry run says, and what happens when memory does not suffice after all."""

import pytest
import torch
import yaml

import training.estimate
from config import parse_config
from model.checkpoint_folder import list_checkpoints
from training.dry_run import describe_run
from training.estimate import Estimate, Line, Setting, longest_sample
from training.loop import Trainer


def linear_trial(run):
    """Instead of a trial: 10 bytes of weights, 4 a sample, half of that with checkpointing."""

    def trial(batch, checkpointing):
        samples = 0 if batch is None else len(batch.lengths)
        return 10 + samples * (2 if checkpointing else 4), 0.5 + samples

    return trial


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.setattr("training.build.make_trial", linear_trial)
    monkeypatch.setattr(training.estimate, "ADAMW_BYTES", 0)
    return lambda size: monkeypatch.setattr("training.build.usable_memory", lambda device: size)


@pytest.mark.parametrize(
    ("bytes_", "samples", "checkpointing", "expected"),
    [
        (27, 8, "auto", Setting(4, 2, False)),
        (1000, 12, "auto", Setting(4, 3, False)),  # 8 does not divide 12
        (1000, 8, "on", Setting(8, 1, True)),
        (14, 8, "auto", Setting(1, 8, False)),
        (13, 8, "auto", Setting(1, 8, True)),
        (27, 8, "on", Setting(8, 1, True)),
    ],
)
def test_auto_takes_the_largest_that_fits(bytes_, samples, checkpointing, expected, configure, limit):
    limit(bytes_)
    trainer = Trainer(configure(micro_batch="auto", samples_per_step=samples, gradient_checkpointing=checkpointing))
    assert trainer.setting == expected
    assert trainer.model.language_model.model.layers[0].gradient_checkpointing == expected.checkpointing
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_nothing_fits(configure, limit):
    limit(11)
    with pytest.raises(
        ValueError, match=r"one training sample of \d+ tokens does not fit into the 0.0 GiB.*lower train"
    ):
        Trainer(configure(micro_batch="auto", samples_per_step=8, gradient_checkpointing="auto"))


def test_a_resumed_run_keeps_its_setting(configure, limit):
    automatic = {"micro_batch": "auto", "samples_per_step": 4, "gradient_checkpointing": "auto"}
    limit(18)
    first = Trainer(configure(max_steps=1, **automatic))
    first.run()
    limit(1000)
    resumed = Trainer(configure(max_steps=2, **automatic), resume="auto")
    assert resumed.setting == first.setting == Setting(2, 2, False)


def test_trial_passes_change_nothing_and_cost_is_linear(configure):
    trainer = Trainer(configure(max_steps=1))
    weights = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    text = describe_run(trainer)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in trainer.model.named_parameters())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert "2 × 1" in text
    assert text.count("*") == 2  # the row, and what the star means
    lengths = [len(trainer.train_set.tokens(index).input_ids) for index in range(len(trainer.train_set))]
    assert len(trainer.train_set.tokens(longest_sample(trainer.train_set)).input_ids) == max(lengths)
    assert trainer.estimate.seconds(2000, True) > 0
    line = Line.through((10, 5.0), (20, 7.0))
    assert (line(10), line(30)) == (5.0, 9.0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_trials_of_several_samples_may_fail(configure, error):
    """The memory of two samples was predicted to fit and does not: the single sample gives both lines."""
    run = Trainer(configure(max_steps=1))
    sample = run.train_set[longest_sample(run.train_set)]

    def trial(batch, checkpointing):
        samples = 0 if batch is None else len(batch.lengths)
        if samples > 1:
            raise error
        return 10 + 4 * samples, 0.5 + samples

    estimate = Estimate(trial, sample, limit=1000, trained=0, budget=None)
    assert estimate.memory(estimate.longest, False) == pytest.approx(14)
    assert estimate.memory(2 * estimate.longest, False) == pytest.approx(18)


def test_out_of_memory_is_one_sentence_and_keeps_what_is_there(configure, monkeypatch):
    trainer = Trainer(configure(max_steps=9))
    forward = trainer.forward

    def fails_at_step_3(*arguments):
        if trainer.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*arguments)

    monkeypatch.setattr(trainer, "forward", fails_at_step_3)
    with pytest.raises(ValueError, match=r"^out of memory at step 3: lower train.micro_batch") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in list_checkpoints(trainer.output_dir)] == ["checkpoint-2"]


def test_config_of_steps():
    def train(text):
        raw = {"visual": {"path": "v"}, "llm": {"path": "l"}, "train": yaml.safe_load(text)}
        return parse_config(raw, "my.yaml").train

    given = {"on": "on", "off": "off", "true": "on", "false": "off", "auto": "auto", "'on'": "on"}
    for text, expected in given.items():  # YAML 1.1 reads on and off as true and false
        assert train(f"gradient_checkpointing: {text}").gradient_checkpointing == expected
    dumped = yaml.safe_dump(train("gradient_checkpointing: on").model_dump(mode="json"))
    assert train(dumped).gradient_checkpointing == "on"
    assert train("{micro_batch: auto, samples_per_step: 32}").micro_batch == "auto"
    for text in ("micro_batch: auto", "samples_per_step: 8"):
        with pytest.raises(ValueError, match=r"'train': with micro_batch: auto, 'samples_per_step' says"):
            train(text)
    for value in ("0", "many", "true", "2.5"):
        with pytest.raises(ValueError, match=r"'train.micro_batch' = .*: it should be auto or a whole number"):
            train(f"micro_batch: {value}")
