"""Optimizer groups and learning-rate schedule. Called by `build.py`."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from config import Train
from model.model import MMultiModal


def build_optimizer(model: MMultiModal, train: Train) -> torch.optim.AdamW:
    """Build AdamW with the learning rate of each part; 1-D parameters have no weight decay.

    Raises:
        AssertionError: a parameter outside the parts is trainable.
    """
    groups: list[dict[str, Any]] = []
    for part in model.parts:
        parameters = [parameter for parameter in part.parameters.values() if parameter.requires_grad]
        for decayed in (True, False):
            members = [parameter for parameter in parameters if (parameter.ndim > 1) == decayed]
            if members:
                decay = train.weight_decay if decayed else 0.0
                groups.append({"params": members, "lr": part.lr, "weight_decay": decay, "name": part.name})
    count = sum(len(group["params"]) for group in groups)
    assert count == sum(parameter.requires_grad for parameter in model.parameters()), "a frozen part is trainable"
    return torch.optim.AdamW(groups, betas=train.betas, fused=model.device.type == "cuda")


def build_schedule(optimizer: torch.optim.Optimizer, train: Train, total_steps: int) -> LambdaLR:
    """Build a linear warm-up over `warmup_ratio` of the steps, then a cosine down to `min_lr_ratio` of the peak."""
    warmup = round(train.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)
