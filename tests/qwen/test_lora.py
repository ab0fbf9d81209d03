"""Our LoRA layer gives what peft's gives: output and every gradient, with dropout, autocast, merging, switching off."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qwen.lora import LoraLinear, dropout_mask


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 7, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class SameDropout(nn.Module):
    """nn.Dropout with our mask: torch's own draws other numbers."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * dropout_mask(x, self.p) / (1 - self.p)


def pair(dropout=0.0, dtype=torch.float64):
    """The same model with peft's layers and with ours."""
    models = []
    for ours in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["first", "second"])
        if ours:
            config._register_custom_module({nn.Linear: LoraLinear})
        model = get_peft_model(Layers().to(dtype), config).train()
        if dropout and not ours:
            for layer in (model.base_model.model.first, model.base_model.model.second):
                layer.lora_dropout["default"] = SameDropout(dropout)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        models.append(model)
    assert sum(isinstance(module, LoraLinear) for module in models[1].modules()) == 2
    return models


def run(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(5)  # of dropout
    output = model(x)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    return output, gradients | {"x": x.grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients(dropout, dtype, tolerance):
    x = torch.randn(2, 5, 12, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (theirs, their_gradients), (ours, our_gradients) = (run(model, x) for model in pair(dropout, dtype))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():  # in norm: single elements may be small differences of large numbers
        assert (gradient - their_gradients[name]).norm() <= tolerance * their_gradients[name].norm(), name


@pytest.mark.parametrize("p", [0.05, 0.3, 0.999])
def test_dropout_drops_its_share_and_one_element_tells_nothing_of_another(p):
    torch.manual_seed(0)
    x = torch.empty(999, 1001)  # not a multiple of the four elements of a draw
    dropped = 1 - dropout_mask(x, p).double()
    assert dropped.shape == x.shape
    assert {*dropped.unique().tolist()} == {0.0, 1.0}
    deviation = (p * (1 - p)) ** 0.5  # of one element
    flat = dropped.flatten()
    for part in (flat, *(flat[lane::4] for lane in range(4))):
        assert abs(part.mean() - p) < 5 * deviation / len(part) ** 0.5  # five standard errors
    for step in (1, 2, 3, 4, 1001):  # within a draw, to the next one, and one row below
        covariance = ((flat[step:] - p) * (flat[:-step] - p)).mean()
        assert abs(covariance) < 5 * deviation**2 / len(flat) ** 0.5, step
    assert not torch.equal(dropout_mask(x, p), 1 - dropped)  # the next one is another


@pytest.mark.parametrize(("p", "kept"), [(1e-7, 1.0), (1 - 1e-7, 0.0)])
def test_dropout_nearer_to_all_or_nothing_than_16_bits_can_say(p, kept):
    torch.manual_seed(0)
    assert abs(dropout_mask(torch.empty(100, 100), p).float().mean() - kept) < 1e-3


def test_autocast_is_no_less_exact_than_pefts():
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    models = pair(dtype=torch.float32)
    expected, expected_gradients = run(models[0], x)
    errors = []
    for model in models:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output, gradients = run(model, x)
        assert output.dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        differences = {name: gradients[name] - gradient for name, gradient in expected_gradients.items()}
        errors.append({name: float(difference.norm()) for name, difference in differences.items()})
        errors[-1]["output"] = float((output.float() - expected).norm())
    assert all(errors[1][name] <= 1.5 * errors[0][name] for name in errors[0]), errors


def test_numeric_gradient():
    _, ours = pair()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))


@torch.no_grad()
def test_merging_and_switching_off_go_to_peft():
    theirs, ours = pair()
    x = torch.randn(3, 12, dtype=torch.float64)
    unmerged = ours(x)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), unmerged, rtol=1e-12, atol=1e-12)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours.merge_and_unload()(x), unmerged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_the_sums_are_the_same_and_autograd_is_not_called(autocast, monkeypatch):
    _, ours = pair(dropout=0.3, dtype=torch.float32)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for model in (ours, ours.eval()):
            torch.manual_seed(5)  # of dropout
            expected = model(x)
            torch.manual_seed(5)
            monkeypatch.setattr("qwen.lora._LowRankLinear.apply", lambda *_: pytest.fail("autograd was called"))
            with torch.no_grad():
                assert torch.equal(model(x), expected)
            monkeypatch.undo()
    assert expected.requires_grad


def test_the_operator_for_gpus_is_the_product_with_the_mask():
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = dropout_mask(x.flatten(), 0.3).view(x.shape)
    assert 0 < int(mask.sum()) < x.numel()
    assert torch.equal(torch.ops.aten.native_dropout_backward(x, mask.view(torch.bool), 1.0), x * mask)


def test_lora_that_is_not_trained_has_no_dropout():
    _, model = pair(dropout=0.5)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.requires_grad_(requires_grad=False)
    assert torch.equal(model(x), model(x))
