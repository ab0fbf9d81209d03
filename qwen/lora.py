"""peft's LoRA layer with fused arithmetic: same results, fewer passes over memory.

peft computes `W x + (B A x) · s` with one tensor per term, in the forward and the backward pass. Here the second
product is added to the first during its computation. Used by `model/parts.py` for weights that are not quantised.
For answering, `merge_lora` adds B A to W once.

Shapes: T tokens, I and O inputs and outputs of the layer, r rank.
"""

from collections import Counter

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _products(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x Wᵀ + bias + s · (m ∘ x) Aᵀ Bᵀ` (T, O) and `(m ∘ x) Aᵀ` (T, r); m is dropout's mask, None for all."""
    low = functional.linear(_masked(x, mask), A)  # (T, r)
    return functional.linear(x, weight, bias).addmm_(low, B.t(), alpha=scaling), low


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return `mask ∘ x`, or `x` without a mask."""
    if mask is None:
        return x
    if mask.is_cuda:  # there, a product of two types takes almost three times as long
        return torch.ops.aten.native_dropout_backward(x, mask.view(torch.bool), 1.0)
    return x * mask


def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return a mask for `x`, uint8: 0 with probability `p`, else 1; on CPUs, `p` is rounded to 16 bits.

    It is not bool, because a CPU multiplies `x` by bytes faster than by bools.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p).view(torch.uint8)
    # a CPU draws numbers one by one: for one an element, W x takes no longer; so one of 64 bits for four elements
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of 65,536 values; with all of them, the bound below would be no int16
    return (draws[: x.numel()] >= dropped - 2**15).view(x.shape).view(torch.uint8)


class _LowRankLinear(torch.autograd.Function):
    """The first of `_products`; W and bias are frozen.

    The backward pass computes `m ∘ x` again: dropout costs it one byte an element of x.
    """

    @staticmethod
    def forward(ctx, x, mask, weight, bias, A, B, scaling):
        """(T, I), (T, I) uint8 or None for all, (O, I), (O,) or None, (r, I), (O, r), float → (T, O)."""
        ctx.scaling, ctx.dtype = scaling, A.dtype
        A, B = A.to(x.dtype), B.to(x.dtype)
        output, low = _products(x, mask, weight, bias, A, B, scaling)
        ctx.save_for_backward(x, mask, low, weight, A, B)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, mask, low, weight, A, B = ctx.saved_tensors
        # β = 0: only the shape of the first argument counts; a product with a factor is one kernel on a GPU
        low_gradient = torch.addmm(low, gradient, B, beta=0, alpha=ctx.scaling)  # (T, r)
        A_gradient = B_gradient = x_gradient = None
        if ctx.needs_input_grad[4]:
            A_gradient = (low_gradient.t() @ _masked(x, mask)).to(ctx.dtype)
        if ctx.needs_input_grad[5]:
            B_gradient = torch.addmm(B, gradient.t(), low, beta=0, alpha=ctx.scaling).to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ weight
            if mask is None:
                x_gradient.addmm_(low_gradient, A)
            else:
                x_gradient += _masked(low_gradient @ A, mask)
        return x_gradient, None, None, None, A_gradient, B_gradient, None


class LoraLinear(Linear):
    """As `peft.tuners.lora.Linear` with one plain adapter; in all other cases, peft's own forward pass runs."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(…, I) → (…, O), in the dtype that autocast picks, or that of `x`."""
        base, kind = self.base_layer, x.device.type
        plain = self.active_adapters == ["default"] and not (self.disable_adapters or self.merged or args or kwargs)
        # a weight that is not in memory is fetched when its own layer is called
        if not plain or base.weight.requires_grad or base.weight.is_meta:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weight, bias = base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])  # (T, I)
        dropout, mask, scaling = self.lora_dropout["default"], None, self.scaling["default"]
        matrices = (self.lora_A["default"].weight, self.lora_B["default"].weight)
        # dropout is for what is trained: with a learning rate of 0 it would only be noise
        if self.training and matrices[0].requires_grad and not isinstance(dropout, torch.nn.Identity):
            mask = dropout_mask(flat, dropout.p)
            scaling /= 1 - dropout.p
        if torch.is_grad_enabled():
            with torch.autocast(kind, enabled=False):
                output = _LowRankLinear.apply(flat, mask, weight, bias, *matrices, scaling)
        else:  # for one new token, autograd's function takes longer than the products
            A, B = (matrix.to(x.dtype) for matrix in matrices)
            output, _ = _products(flat, mask, weight, bias, A, B, scaling)
        return output.view(*x.shape[:-1], -1)


def merge_lora(model: nn.Module) -> bool:
    """Add all LoRA in `model` to the float32 weights it belongs to, and put plain layers in its place.

    Returns:
        Whether none is left. All stays as it is if any of these weights

        * is bf16, fp16 or quantised: LoRA changes a weight by less than the distance to the next value that these
          formats have, so the change would be lost;
        * is also another layer's, as an output matrix that is the input matrix;
        * is not in memory (`llm.device_map: auto` with too little of it).
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    weights = [layer.get_base_layer().weight for layer in layers.values()]
    if any(weight.dtype != torch.float32 or weight.is_meta or uses[id(weight)] > 1 for weight in weights):
        return False
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return True
