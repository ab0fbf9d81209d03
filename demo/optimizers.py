"""Optimizers of both pretraining runs: Muon for the matrices of the transformer layers, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon) needs about half the steps of AdamW for such small models.
"""

import torch
from torch import nn


def make_optimizers(model: nn.Module, layers: nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices in `layers` (rate `peak`) and AdamW for the rest of `model` (rate `peak / 2`)."""
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        torch.optim.Muon(
            [{"params": matrices, "peak": peak}], lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([{"params": others, "peak": peak / 2}], lr=peak / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def take_step(optimizers: list[torch.optim.Optimizer], model: nn.Module) -> None:
    """Clip the gradients to norm 1, make one step, and clear them."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
