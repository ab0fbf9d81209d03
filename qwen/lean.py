"""One decoder layer with fewer tensors kept for the backward pass; values and gradients are those of the layer itself.

With frozen weights, a linear layer needs its input only for the gradient of LoRA's A. These inputs are norms and gated
products, which are cheap to compute again. Called by `Mqwen.py::packed_states`.

Kept per token of Qwen2.5-0.5B's layer (widths 896 and 4864): 15,000 numbers instead of 27,000. Time and memory of a
step: `python -m benchmarks.train_step --sides ours whole_layers`.

Shapes: T tokens, D width, F width of the MLP, S selected positions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from compat import fused_rms_norm


class _LeanNorm(torch.autograd.Function):
    """A root-mean-square norm that keeps its input only."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """`(…, T, D)` → `(…, T, D)`; `weight` is that of `norm`, an argument for the sake of its gradient."""
        ctx.save_for_backward(hidden, weight)
        ctx.epsilon = norm.variance_epsilon
        return norm.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        hidden, weight = ctx.saved_tensors
        wide = hidden.to(torch.float32)  # as in the forward pass of the norm
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.epsilon)
        normed = wide * scale
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed.to(hidden.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = (gradient * weight).to(torch.float32)
            mean = (inner * normed).mean(-1, keepdim=True)
            hidden_gradient = inner.sub_(normed.mul_(mean)).mul_(scale).to(hidden.dtype)
        return hidden_gradient, weight_gradient, None


class _GatedProduct(torch.autograd.Function):
    """`activation(gate) * up`, which keeps gate and up only."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        """Two `(…, T, F)` → `(…, T, F)`."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (gate_gradient,) = torch.autograd.grad(activated, gate, gradient * up)
        return gate_gradient, gradient * activated.detach(), None


def _has_kernel(norm: nn.Module, hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and norm.weight.dtype == hidden.dtype


def _norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The norm's `forward`, `(…, T, D)` → `(…, T, D)`; on a GPU in one kernel, which rounds once instead of twice."""
    if _has_kernel(norm, hidden):
        return fused_rms_norm(hidden, norm.weight, norm.variance_epsilon)
    return norm.forward(hidden)


def _lean_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """As `_norm`; keeps only the input for the backward pass, as the kernel does by itself."""
    return _norm(norm, hidden) if _has_kernel(norm, hidden) else _LeanNorm.apply(hidden, norm.weight, norm)


def _computed_again(
    tensor: torch.Tensor, compute: Callable[[], torch.Tensor], keep: bool = False
) -> AbstractContextManager:
    """Context in which `tensor` is not kept for the backward pass, but computed again by `compute`, unless `keep`.

    Layers keep a reshaped view of it, so it is recognised by its memory. The context must end before `tensor` is freed.
    """
    if keep:
        return nullcontext()
    # torch holds `pack` as long as what it returned, so `pack` must not hold the tensor
    own = (tensor.data_ptr(), tensor.numel(), tensor.dtype)

    def pack(kept: torch.Tensor) -> torch.Tensor | torch.Size:
        same = (kept.data_ptr(), kept.numel(), kept.dtype) == own and kept.is_contiguous()
        return kept.shape if same else kept

    def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
        return packed if torch.is_tensor(packed) else compute().view(packed)

    return saved_tensors_hooks(pack, unpack)


def run_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    selected: torch.Tensor | None = None,
    keep: bool = False,
    **arguments,
) -> torch.Tensor:
    """The forward pass of a Qwen2, Qwen3 or Llama decoder layer.

    Args:
        hidden: (1, T, D).
        selected: (1, T) bool; the MLP runs at these positions only.
        keep: keep norms and products. Needed where the whole layer is computed again (gradient checkpointing), because
            only the innermost hooks of saved tensors take effect.
        arguments: of the layer's attention.

    Returns:
        (1, T, D), or (S, D) with `selected`.
    """
    norm = layer.input_layernorm
    normed = _lean_norm(norm, hidden)
    with _computed_again(normed, lambda: _norm(norm, hidden), keep):
        attended, _ = layer.self_attn(normed, **arguments)
    after = hidden + attended
    if selected is not None:
        after = after[selected.to(after.device)]  # layers may be on several GPUs
    return after + _run_mlp(layer, after, keep)


def _run_mlp(layer: nn.Module, hidden: torch.Tensor, keep: bool) -> torch.Tensor:
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    normed = _lean_norm(norm, hidden)
    with _computed_again(normed, lambda: _norm(norm, hidden), keep):
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
    product = _GatedProduct.apply(gate, up, mlp.act_fn)
    with _computed_again(product, lambda: mlp.act_fn(gate) * up, keep):
        return mlp.down_proj(product)
