"""How far training moved each part from where it began. Called by `build.py` and `due.py`.

What is measured is the relative change |w - w0| / |w0| in the Euclidean norm over all weights w of a part, where w0 are
those at the start of the run (of a stage: at the start of the stage). A LoRA counts as a whole, its A and B together; B
starts at zero, so its part of the change is B itself.

To keep w0 whole would cost as much memory as the part. So at most `MOST` numbers of each tensor are kept, at even
strides, and their squares stand for the squares of the others: exact for tensors of up to `MOST` numbers, an estimate
for larger ones.
"""

import math

import torch

from model.model import MMultiModal

MOST = 4096  # 16 KiB of each tensor: 7 MiB for LoRA on all 448 matrices of a 7B model

Sample = dict[str, dict[str, torch.Tensor]]  # part → weight → some of its numbers


def sample_weights(model: MMultiModal) -> Sample:
    """The numbers of every part that are followed: 1-D, float32, on the CPU."""
    return {part.name: {name: _numbers(weight) for name, weight in part.parameters.items()} for part in model.parts}


def movement(model: MMultiModal, start: Sample) -> dict[str, float]:
    """Relative change of each part since `start`; 1.0 for a part of zeros that are zeros no more."""
    moved = {}
    for part in model.parts:
        if part.name not in start:  # a LoRA that was never trained may be left out of a resumed run, and come back
            continue
        change = before = after = 0.0
        for name, weight in part.parameters.items():
            now, then = _numbers(weight).double(), start[part.name][name].double()
            others = weight.numel() / len(now)  # how many numbers each of the kept ones stands for
            change += others * float((now - then).square().sum())
            before += others * float(then.square().sum())
            after += others * float(now.square().sum())
        moved[part.name] = math.sqrt(change / (before or after)) if change else 0.0
    return moved


def describe_movement(moved: dict[str, float]) -> str:
    """A sentence for the log."""
    said = [
        f"{name} moved by {100 * share:.3g} %" if share else f"{name} did not move" for name, share in moved.items()
    ]
    return f"{', '.join(said)} (relative change of the weights, in norm)"


def _numbers(weight: torch.Tensor) -> torch.Tensor:
    stride = math.ceil(weight.numel() / MOST)
    # a copy in any case: on the CPU the slice of a float32 weight would change with it
    return weight.detach().flatten()[::stride].to("cpu", torch.float32, copy=True)
