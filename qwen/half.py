"""fp16 weights for answering on a CPU, with float32 activations.

Choosing a token reads every weight once, so half the bytes take half the time. fp16 holds the weights of published
models, which are bf16, and rounds only those below 8e-6. Called by `model/checkpoint.py`.
"""

import torch
from torch import nn
from torch.nn import functional

from compat import fp16_pack, fp16_product, fp16_unpack


class HalfLinear(nn.Module):
    """A linear layer with fp16 weights (O, I), made of one with float32 weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = fp16_pack(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, I) → (…, O), both float32."""
        if torch.is_grad_enabled():  # the packed product has no gradient
            return functional.linear(x, *fp16_unpack(self._packed))
        return fp16_product(x, self._packed)


def linear_weights(model: nn.Module) -> int:
    """Number of weights that `halve` makes fp16."""
    return sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear)


def halve(model: nn.Module) -> None:
    """Give all plain linear layers fp16 weights. An output matrix that is the input matrix becomes one of its own."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, HalfLinear(layer))
