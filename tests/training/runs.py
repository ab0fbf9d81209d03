"""What tests of training runs read from a run folder, and how they interfere with a step."""

import json

import torch
from safetensors.torch import load_file

from training.stages import stages


def weights(folder):
    """The trained tensors of a checkpoint by name."""
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(first, second):
    """Whether two checkpoints hold the same weights, bit for bit."""
    first, second = weights(first), weights(second)
    assert first, "a folder without weights is no checkpoint"
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines(folder):
    """The log of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """The logged losses of a run by step."""
    return {line["step"]: line["loss"] for line in lines(folder)}


def train(config, resume=None, accept_changes=False):
    """Train all stages of a run as `train.py` does; the last checkpoint folder."""
    folder = None
    for trainer in stages(config, resume, accept_changes):
        folder = trainer.run()
        del trainer
    return folder


def names(folder):
    """Names of the checkpoints in a run folder, unfinished and superseded ones included."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def at_step(trainer, number, action):
    """Call `action` in the first forward pass of optimizer step `number`."""
    forward, called = trainer.forward, []

    def wrapped(*arguments):
        if trainer.progress.step == number - 1 and not called:
            called.append(number)
            action()
        return forward(*arguments)

    trainer.forward = wrapped
