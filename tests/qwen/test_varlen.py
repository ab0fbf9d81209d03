"""The attention for GPUs in one call equals the one a sample at a time; without a GPU, its kernel is emulated."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import compat
from qwen import varlen
from qwen.attention import PackedMask, _packed_attention
from qwen.varlen import split_row, varlen_attention

HEADS, GROUPS, WIDTH = 4, 2, 8
LENGTHS = ((9, 4, 1, 6), (5,), (7, 3), (12, 2, 2), (3,))


def each(ends):
    """Slices of the queries and keys of each sequence."""
    for first, last, start, end in zip(ends.queries[:-1], ends.queries[1:], ends.keys[:-1], ends.keys[1:], strict=True):
        assert last - first <= ends.longest_query
        assert end - start <= ends.longest_key
        yield slice(first, last), slice(start, end)


def attend(query, key, value, ends, window, scale):
    """Attention of each sequence, its last query aligned with its last key."""
    found = []
    for own, seen in each(ends):
        q, k, v = query[own].transpose(0, 1), key[seen].transpose(0, 1), value[seen].transpose(0, 1)
        place = torch.arange(k.shape[1])
        distance = place[k.shape[1] - q.shape[1] :, None] - place
        visible = (distance >= 0) & (distance < (window or k.shape[1]))
        found.append(scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True))
    return torch.cat(found, dim=1).transpose(0, 1)


def emulated_forward(query, key, value, ends, window, scale):
    return attend(query, key, value, ends, window, scale), torch.zeros(1), torch.zeros(1), torch.zeros(1)


def emulated_backward(gradient, query, key, value, output, state, ends, window, scale):
    assert len(state) == 3
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        again = attend(*given, ends, window, scale)
    assert torch.equal(again, output)
    return torch.autograd.grad(again, given, gradient)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(compat, "flash_forward", emulated_forward)
    monkeypatch.setattr(compat, "flash_backward", emulated_backward)


def tensors(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, LENGTHS))
    rows = [torch.randn(1, tokens, count, WIDTH, generator=generator) for count in (HEADS, GROUPS, GROUPS)]
    return [row.to(device, dtype).transpose(1, 2).requires_grad_() for row in rows]  # as layers give them


def compare(window, scale, given, tolerance):
    """Compare both, forward and backward, with weights that differ by place; return the number of calls."""
    calls = split_row(LENGTHS, given[0].device)
    one = varlen_attention(*given, calls, window, scale)
    many = _packed_attention(*given, PackedMask(LENGTHS, window), {"scale": scale})
    assert one.shape == many.shape
    weights = torch.randn(many.shape, generator=torch.Generator().manual_seed(1)).to(many)
    sides = [[out, *torch.autograd.grad((out * weights).sum(), given)] for out in (one, many)]
    for own, other in zip(*sides, strict=True):
        assert (own - other).norm() <= tolerance * other.norm()
    return len(calls)


@pytest.mark.parametrize("most_keys", [1, 30, 10**6])
@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_a_sample_at_a_time(emulated, monkeypatch, window, scale, most_keys):
    monkeypatch.setattr(varlen, "MOST_KEYS", most_keys)
    # float32 sums of the gradient; another order of products
    assert compare(window, scale, tensors(torch.float64), 1e-6) == {1: 5, 30: 4, 10**6: 1}[most_keys]


def test_keys_are_kept_once(emulated):
    """What the backward pass needs does not grow with the branches of a prefix."""
    given, calls = tensors(torch.float32), split_row(LENGTHS, torch.device("cpu"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda packed: packed):
        varlen_attention(*given, calls, None, None)
    assert sum(kept) == 2 * given[0].numel() + given[1].numel() + given[2].numel() + 3


def test_a_row_without_branches_is_not_copied():
    [call] = split_row(((5,), (7,)), torch.device("cpu"))
    assert call.keys is None
    assert call.ends.keys.tolist() == call.ends.queries.tolist() == [0, 5, 12]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_itself(window, dtype):
    given = tensors(dtype, "cuda")
    if not compat.has_flash_attention(given[0]):
        pytest.skip("this GPU has no FlashAttention")
    compare(window, None, given, 2e-2)  # rounding to 8 bits, of both


def test_what_the_kernel_takes():
    def taken(dtype, width, device):
        return compat.has_flash_attention(torch.zeros(1, 2, 3, width, dtype=dtype, device=device))

    assert not taken(torch.bfloat16, 8, "cpu")
    if torch.cuda.is_available():
        new = torch.cuda.get_device_capability() >= (8, 0)
        assert taken(torch.float16, 8, "cuda") == taken(torch.bfloat16, 8, "cuda") == new
        assert not taken(torch.float32, 8, "cuda")
        assert not taken(torch.bfloat16, 4, "cuda")
        assert not taken(torch.bfloat16, 264, "cuda")
