"""What the optimizer gets, and what it must leave alone."""

import pytest
import torch

from training.batches import make_loader
from training.loop import Trainer


def lora(model):
    return {name: p for name, p in model.LLM.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("rate", [1e-2, 0.0])
def test_projector_alone_or_with_lora(configure, rate):
    trainer = Trainer(configure(max_steps=3, lora_lr=rate))
    before = {name: p.detach().clone() for name, p in lora(trainer.model).items()}
    trainer.run()
    assert {group["name"] for group in trainer.optimizer.param_groups} == {"projector"} | ({"lora"} if rate else set())
    changed = [name for name, p in lora(trainer.model).items() if not torch.equal(p, before[name])]
    assert bool(changed) == bool(rate)
    states = trainer.optimizer.state_dict()["state"]
    assert len(states) == 4 + (len(before) if rate else 0)


def test_frozen_lora_counts_in_no_norm(configure):
    trainer = Trainer(configure(lora_lr=0.0))
    for parameter in lora(trainer.model).values():
        parameter.data.normal_(std=0.1)  # as `train.init_from` may bring them
    trainer.forward(
        next(iter(make_loader(trainer.train_set, [[0, 1]], 0, trainer.accelerator.device))), None
    ).backward()
    assert all(parameter.grad is None for parameter in lora(trainer.model).values())
    own = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.feature_proj.parameters()])
    assert trainer.accelerator.clip_grad_norm_(trainer.wrapped.parameters(), 1.0) == own > 0
