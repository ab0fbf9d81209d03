"""peft's LoRA layer with fused arithmetic: same results, fewer passes over memory.

peft computes `W x + (B A x) · s` with one tensor per term, in the forward and the backward pass. Here the second
product is added to the first during its computation. Used by `model/parts.py` for weights that are not quantised.

Shapes: T tokens, I and O inputs and outputs of the layer, r rank.
"""

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _LowRankLinear(torch.autograd.Function):
    """`x Wᵀ + bias + s · d Aᵀ Bᵀ`, where d is x or x after dropout; W and bias are frozen."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, A, B, scaling):
        """(T, I), (T, I) or None for x itself, (O, I), (O,) or None, (r, I), (O, r), float → (T, O)."""
        ctx.scaling = scaling
        source = x if dropped is None else dropped
        low, B_here = functional.linear(source, A.to(x.dtype)), B.to(x.dtype)  # (T, r), (O, r)
        output = functional.linear(x, weight, bias).addmm_(low, B_here.t(), alpha=scaling)
        ctx.save_for_backward(source, low, weight, A, B)
        ctx.has_dropout = dropped is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        source, low, weight, A, B = ctx.saved_tensors
        low_gradient = (gradient @ B.to(gradient.dtype)).mul_(ctx.scaling)  # (T, r)
        A_gradient = B_gradient = x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[4]:
            A_gradient = (low_gradient.t() @ source).to(A.dtype)
        if ctx.needs_input_grad[5]:
            B_gradient = (gradient.t() @ low).mul_(ctx.scaling).to(B.dtype)
        A_here = A.to(gradient.dtype)
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ weight
            if not ctx.has_dropout:
                x_gradient.addmm_(low_gradient, A_here)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            dropped_gradient = low_gradient @ A_here
        return x_gradient, dropped_gradient, None, None, A_gradient, B_gradient, None


class LoraLinear(Linear):
    """As `peft.tuners.lora.Linear` with one plain adapter; in all other cases, peft's own forward pass runs."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(…, I) → (…, O), in the dtype that autocast picks, or that of `x`."""
        base, kind = self.base_layer, x.device.type
        plain = self.active_adapters == ["default"] and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weight, bias = base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])  # (T, I)
        dropout = self.lora_dropout["default"]
        dropped = dropout(flat) if self.training and not isinstance(dropout, torch.nn.Identity) else None
        matrices = (self.lora_A["default"].weight, self.lora_B["default"].weight)
        with torch.autocast(kind, enabled=False):
            output = _LowRankLinear.apply(flat, dropped, weight, bias, *matrices, self.scaling["default"])
        return output.view(*x.shape[:-1], -1)
