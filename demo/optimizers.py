"""Optimizers of both pretraining runs: Muon for the matrices of the transformer layers, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon) needs about half the steps of AdamW for such small models.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

MOMENTUM, WEIGHT_DECAY = 0.95, 0.01
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's post, as in `torch.optim.Muon`
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32, with matrices of one shape computed together.

    torch's class computes in bf16. On a CPU without bf16 instructions its step takes as long as the forward and
    backward pass of such a small model.
    """

    def __init__(self, matrices: Iterable[Tensor], peak: float) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group, "peak": peak} for group in by_shape.values()], {"lr": peak})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights by the orthogonalized momentum of their gradients (all have one)."""
        for group in self.param_groups:
            weights = group["params"]
            gradient = torch.stack([weight.grad for weight in weights])  # (weights, O, I)
            state = self.state[weights[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - MOMENTUM)
            update = _orthogonal(gradient.lerp(momentum, MOMENTUM))
            rate = group["lr"] * 0.2 * max(gradient.shape[1:]) ** 0.5  # an update as large as one of AdamW
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - group["lr"] * WEIGHT_DECAY).sub_(change, alpha=rate)


def _orthogonal(matrices: Tensor) -> Tensor:
    """`(N, O, I)` → the same singular vectors with singular values near 1, by five Newton-Schulz steps."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


def make_optimizers(model: nn.Module, layers: nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices in `layers` (rate `peak`) and AdamW for the rest of `model` (rate `peak / 2`)."""
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        Muon(matrices, peak),
        torch.optim.AdamW([{"params": others, "peak": peak / 2}], lr=peak / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def take_step(optimizers: list[torch.optim.Optimizer], model: nn.Module) -> None:
    """Average the gradients over the processes, clip them to norm 1, make one step, and clear them."""
    if dist.is_initialized():
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        together = parameters_to_vector(gradients)  # one message, not one for each weight
        dist.all_reduce(together)
        vector_to_parameters(together / dist.get_world_size(), gradients)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
