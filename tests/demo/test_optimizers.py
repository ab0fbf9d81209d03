"""Muon of the demo's pretraining: the steps of torch's class."""

import torch

from demo.optimizers import Muon


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's class then computes in float64
    torch.manual_seed(0)
    shapes = [(6, 6), (6, 6), (12, 6), (4, 6)]
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizers = [
        Muon(ours, 4e-3),
        torch.optim.Muon(theirs, lr=4e-3, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) + step
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 - step / 10)
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        assert moved > 0.005
        assert (mine - other).norm() < 1e-10 * moved  # float64, and products of another size
