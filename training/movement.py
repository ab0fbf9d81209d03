"""Relative change of each part's weights during training. Called by `build.py` and `due.py`.

The relative change is |w - w0| / |w0| in the Euclidean norm over all weights w of a part. w0 are the weights at the
start of the run, or of the stage. A and B of a LoRA count together; B starts at zero, so its change is B itself.

Storing all of w0 would need as much memory as the part. At most `MOST` numbers of each tensor are stored, at even
strides, and their squares are scaled to the size of the tensor. This is exact for tensors of up to `MOST` numbers and
an estimate for larger ones.
"""

import math

import torch

from model.model import MMultiModal
from training.sharding import whole

MOST = 4096  # numbers per tensor (16 KiB): 7 MiB for LoRA on all 448 matrices of a 7B model

WeightSample = dict[str, dict[str, torch.Tensor]]  # part → weight → sampled numbers of it


def sample_weights(model: MMultiModal) -> WeightSample:
    """Return the sampled numbers of every part: 1-D, float32, on the CPU."""
    return {part.name: {name: _numbers(weight) for name, weight in part.parameters.items()} for part in model.parts}


def movement(model: MMultiModal, start: WeightSample) -> dict[str, float]:
    """Return the relative change of each part since `start`; 1.0 for a part that started at zero and changed."""
    moved = {}
    for part in model.parts:
        change = before = after = 0.0
        for name, weight in part.parameters.items():
            now, then = _numbers(weight).double(), start[part.name][name].double()
            others = weight.numel() / len(now)  # scale from the sampled numbers to the whole tensor
            change += others * float((now - then).square().sum())
            before += others * float(then.square().sum())
            after += others * float(now.square().sum())
        moved[part.name] = math.sqrt(change / (before or after)) if change else 0.0
    return moved


def describe_movement(moved: dict[str, float]) -> str:
    """Return a sentence about the change of each part, for the log."""
    said = [
        f"{name} moved by {100 * share:.3g} %" if share else f"{name} did not move" for name, share in moved.items()
    ]
    return f"{', '.join(said)} (relative change of the weights, in norm)"


def _numbers(weight: torch.Tensor) -> torch.Tensor:
    weight = whole(weight)
    stride = math.ceil(weight.numel() / MOST)
    # always copy: on the CPU, a slice of a float32 weight shares its memory
    return weight.detach().flatten()[::stride].to("cpu", torch.float32, copy=True)
