"""fp16 weights on a CPU: those that fp16 holds give the float32 logits; answers stream, share a photo and have maps."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from answering.answer import Answerer
from compat import has_fp16_product
from evaluation.passes import describe
from model import precision
from model.checkpoint import load_checkpoint
from model.parts import LLM_FILE, Part
from qwen.half import HalfLinear, halve, linear_weights
from tests.model.test_merging import build, logits

pytestmark = pytest.mark.skipif(not has_fp16_product(), reason="torch has no products with fp16 weights here")
# products of the same numbers, summed in another order, as in test_parity.py
TOLERANCE = 1e-4


@pytest.fixture(params=["qwen2-tied", "qwen2-untied", "qwen3-tied", "llama-tied", "qwen1"])
def model(request, backbones):
    model = build(backbones, request.param)
    model.merge_lora()
    return model


def test_weights_that_fp16_holds_give_the_same_logits(model):
    with torch.no_grad():
        for layer in model.LLM.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(layer.weight.half())
    wanted = logits(model)
    embedding = model.language_model.get_input_embeddings().weight.clone()
    halve(model.LLM)
    assert not [layer for layer in model.LLM.modules() if type(layer) is torch.nn.Linear]
    assert sum(isinstance(layer, HalfLinear) for layer in model.LLM.modules()) == 2 * 7 + 1
    assert torch.equal(model.language_model.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits(model), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_rounding_shows_little_in_other_weights(model):
    wanted = logits(model)
    halve(model.LLM)
    difference = (logits(model) - wanted).norm() / wanted.norm()
    # fp16 rounds a weight by 2⁻¹² of itself at most; over two layers this stays within some times that
    assert 0 < difference < 16 * 2**-12


@pytest.mark.parametrize(
    ("asked", "large", "expected"),
    [({}, True, True), ({}, False, False), ({"train.precision": "float32"}, True, False)],
)
def test_a_large_model_gets_them_where_nothing_is_said(tiny_checkpoint, monkeypatch, asked, large, expected):
    overrides = {"model_root": tiny_checkpoint.parent.parent} | asked
    count = linear_weights(load_checkpoint(tiny_checkpoint, "cpu", overrides=overrides).LLM)
    monkeypatch.setattr(precision, "LARGE", count + (not large))
    model = load_checkpoint(tiny_checkpoint, "cpu", overrides=overrides)
    assert any(isinstance(layer, HalfLinear) for layer in model.LLM.modules()) == expected
    exact = load_checkpoint(tiny_checkpoint, "cpu", torch.float32, overrides)  # as export does
    assert not any(isinstance(layer, HalfLinear) for layer in exact.LLM.modules())


def test_a_quantised_model_gets_none_by_itself():
    cpu = torch.device("cpu")
    assert precision.answering_weights(None, cpu) == (torch.float32, precision.LARGE)
    assert precision.answering_weights(None, cpu, "nf4") == (torch.float32, math.inf)
    assert precision.answering_weights("fp16", cpu, "nf4") == (torch.float32, 0)


def test_gradients_pass_without_float32_weights():
    layer = torch.nn.Linear(20, 12)
    half = HalfLinear(layer)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    output = half(x)
    assert output.grad_fn.saved_tensors == ()
    output.sum().backward()
    weight = layer.weight.detach().half().float()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_that_were_replaced_are_freed(backbones):
    model = build(backbones, "qwen2-untied")
    model.merge_lora()
    gone = [weakref.ref(layer) for layer in model.LLM.modules() if type(layer) is torch.nn.Linear]
    model.parts.append(Part("llm", 1.0, dict(model.LLM.named_parameters()), LLM_FILE))  # as if it were trained whole
    before = len(model.parts)
    halve(model.LLM)
    model.drop_stale_parts()
    gc.collect()
    assert len(model.parts) == before - 1
    assert not [layer for layer in gone if layer() is not None]


def test_all_ways_of_asking_agree(tiny_checkpoint):
    overrides = {"model_root": tiny_checkpoint.parent.parent, "train.precision": "fp16"}
    model = load_checkpoint(tiny_checkpoint, "cpu", overrides=overrides)
    assert any(isinstance(layer, HalfLinear) for layer in model.LLM.modules())
    assert describe(model, tiny_checkpoint, [], {}, "val", None)["computed"] == "float32 on cpu, fp16 weights"
    photo, questions = Image.new("RGB", (64, 50), (220, 20, 20)), ["What is it?", "Which colour?"]
    answerer = Answerer(model)
    alone = [Answerer(model).answer(photo, question) for question in questions]
    assert [answerer.answer(photo, question) for question in questions] == alone  # the photo is read once
    requests = [answerer.request(photo, [{"role": "user", "content": question}]) for question in questions]
    assert [reply.text for reply in answerer.answer_many(requests)] == alone
    whole = Answerer(load_checkpoint(tiny_checkpoint, "cpu", overrides=overrides | {"train.precision": "float32"}))
    maps = [one.look(photo, [{"role": "user", "content": questions[0]}], alone[0])[0] for one in (answerer, whole)]
    np.testing.assert_allclose(maps[0].values, maps[1].values, atol=0.01)  # shares, which sum to 1
