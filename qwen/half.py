"""fp16 weights for answering on a CPU, with float32 activations.

Choosing a token reads every weight once, so half the bytes take half the time. fp16 holds the weights of published
models, which are bf16, and rounds only those below 8e-6. Called by `model/checkpoint.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from compat import fp16_pack, fp16_product, fp16_unpack


class _HalfProduct(torch.autograd.Function):
    """The packed product with a gradient of its input; the float32 weights live only while they are used."""

    @staticmethod
    def forward(ctx, x, packed):
        """(…, I), weights of `fp16_pack` → (…, O), float32."""
        ctx.packed = packed
        return fp16_product(x, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight, _ = fp16_unpack(ctx.packed)
        return gradient @ weight, None


class HalfLinear(nn.Module):
    """A linear layer with fp16 weights (O, I), made of one with float32 weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = fp16_pack(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, I) → (…, O), both float32."""
        return _HalfProduct.apply(x, self._packed) if torch.is_grad_enabled() else fp16_product(x, self._packed)


def linear_weights(model: nn.Module) -> int:
    """Number of weights that `halve` makes fp16."""
    return sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear)


def halve(model: nn.Module) -> None:
    """Give all plain linear layers fp16 weights. An output matrix that is the input matrix becomes one of its own."""
    # only names are kept, so each layer's float32 weights are freed when it is replaced
    for name in [name for name, layer in model.named_modules() if type(layer) is nn.Linear]:
        model.set_submodule(name, HalfLinear(model.get_submodule(name)))
