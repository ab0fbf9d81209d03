"""The lean layer gives the values and gradients of transformers' layer, and keeps less for the backward pass."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from qwen import lean
from qwen.lean import run_layer
from qwen.lora import LoraLinear

TOKENS, WIDTH = 50, 32
CLASSES = {
    "qwen2": (Qwen2Config, Qwen2DecoderLayer),
    "qwen3": (Qwen3Config, Qwen3DecoderLayer),
    "llama": (LlamaConfig, LlamaDecoderLayer),
}


def build(kind, lora, dropout=0.0):
    """A layer with random norms, its LoRA layers trained or all its weights."""
    torch.manual_seed(0)
    config_class, layer_class = CLASSES[kind]
    config = config_class(
        hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, attn_implementation="sdpa",
    )  # fmt: skip
    layer = layer_class(config, 0).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(not lora)
    if lora:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    wrapped = LoraLinear(
                        linear, "default", config=LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), r=4
                    )
                    torch.nn.init.normal_(wrapped.lora_B["default"].weight, std=0.3)
                    setattr(block, name, wrapped)
    return layer, Qwen2RotaryEmbedding(config)


def run(call, layer, rotary, selected=None, dtype=torch.float32):
    """Output, and gradients by name."""
    torch.manual_seed(1)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    arguments = {"attention_mask": None, "position_embeddings": rotary(hidden, positions)}
    output = call(layer, hidden, selected, **arguments)
    (output.float() * torch.sin(torch.arange(output.numel()).view(output.shape))).sum().backward()
    gradients = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    layer.zero_grad()
    return output.detach(), gradients | {"input": hidden.grad}


def whole(layer, hidden, selected=None, **arguments):
    output = layer(hidden, **arguments)
    return output if selected is None else output[selected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_equals_the_layer(kind, lora, some, dtype):
    layer, rotary = build(kind, lora)
    layer.to(dtype)
    selected = torch.arange(TOKENS)[None] % 3 == 1 if some else None
    output, gradients = run(run_layer, layer, rotary, selected, dtype)
    expected, expected_gradients = run(whole, layer, rotary, selected, dtype)
    if selected is None:  # else products of other sizes, which may sum in another order
        assert torch.equal(output, expected)
    # the norm's gradient sums in another order; bfloat16 rounds every intermediate result
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (output - expected).float().norm() <= tolerance * expected.float().norm()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        difference = (gradients[name].double() - gradient.double()).norm()
        assert difference <= tolerance * gradient.double().norm(), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_norm_for_gpus_equals_the_layer_too(kind, lora, monkeypatch):
    """Its operator runs on a CPU as well, in several kernels."""
    monkeypatch.setattr(lean, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(lean, "_LeanNorm", None)
    layer, rotary = build(kind, lora)
    (output, gradients), (expected, expected_gradients) = (run(call, layer, rotary) for call in (run_layer, whole))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 2e-5 * expected_gradients[name].norm(), name


def memory_kept(call, layer, rotary):
    """Bytes that stay allocated between the forward and the backward pass, the output's included."""
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    arguments = {"attention_mask": None, "position_embeddings": rotary(hidden, torch.arange(TOKENS)[None])}
    with torch.profiler.profile(profile_memory=True) as recorded:
        output = call(layer, hidden, **arguments)
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages()), output


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_less(dropout):
    layer, rotary = build("qwen2", True, dropout)
    lean, output = memory_kept(run_layer, layer, rotary)
    other, another = memory_kept(whole, layer, rotary)
    numbers = 2 * 160 + 7 * WIDTH  # gate, up; both norms' inputs, query, keys, values, attention's result twice, output
    masks = (6 * WIDTH + 160) if dropout else 0  # bytes a token: one an input of each of the seven LoRA layers
    assert lean <= 1.15 * TOKENS * (4 * numbers + masks)
    assert other >= 1.5 * lean
    del output, another
