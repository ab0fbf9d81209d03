"""Quantised and placed language models: the same scripts, the same checkpoints. Needs bitsandbytes for most of it."""

import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch

from answering.answer import Answerer
from exporting.write import check_export, write_export
from model.checkpoint import load_checkpoint
from qwen.loading import load_language_model, loading_options
from tests.exporting.conftest import FACTS
from tests.tiny import write_qwen
from training.batches import make_loader
from training.loop import Trainer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# nf4 rounds a normal weight by about 9 %; a random model far from uniform would magnify that
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def wide_qwen(workshop):
    write_qwen(workshop / "wide", **WIDTHS)
    return str(workshop / "wide")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("val_loss" in line for line in lines)
    return {line["step"]: line["loss"] for line in lines}


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def claim_bf16(monkeypatch):
    """`claim_bf16(True)`: bitsandbytes takes this CPU for one with bf16, whose 4-bit weights it packs in eval mode."""
    return lambda has: monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: has)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "has_bf16", "dtype", "bound"),
    [("nf4", False, torch.uint8, 0.25), ("nf4", True, torch.uint8, 0.25), ("int8", False, torch.int8, 0.03)],
)
def test_trains_validates_resumes_and_answers(
    quantization, has_bf16, dtype, bound, claim_bf16, configure, wide_qwen, tmp_path, same_process
):
    claim_bf16(has_bf16)

    def config(folder, **train):
        llm = {"path": wide_qwen, "quantization": quantization}
        train = {"micro_batch": 8, "log_steps": 1, "eval_steps": 7} | train
        return configure(llm=llm, data={"val_fraction": 0.1}, output_dir=str(tmp_path / folder), **train)

    plain = Trainer(configure(llm={"path": wide_qwen}))
    trainer = Trainer(config("whole", max_steps=24, save_steps=20, save_total_limit=9))
    layer = trainer.model.language_model.model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.dtype == dtype
    assert trainer.model.language_model.lm_head.weight.dtype == torch.float32
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.model.parameter_summary().split()[0] == plain.model.parameter_summary().split()[0]
    assert trainer.arithmetic.per_token == plain.arithmetic.per_token

    batch = next(iter(make_loader(trainer.train_set, [[0, 1]], 0, trainer.accelerator.device)))
    with torch.no_grad():
        logits = [t.model.logits(batch) for t in (trainer, plain)]
    assert 0 < relative(*logits) < bound

    folder = trainer.run()
    curve = losses(tmp_path / "whole")
    assert curve[24] < 0.7 * curve[1]
    assert all(p.grad is None or p.requires_grad for p in trainer.model.parameters())
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-20").rename(tmp_path / "part" / "checkpoint-20")
    resumed = Trainer(config("part", max_steps=24), resume="auto")
    resumed.run()
    assert losses(tmp_path / "part") == {step: curve[step] for step in range(21, 25)}

    assert f"quantization: {quantization}" in (folder / "config.yaml").read_text()
    root = {"model_root": trainer.config.model_root}
    model = load_checkpoint(folder, overrides=root)
    photo = trainer.train_set.photos[0].path
    answer = Answerer(model).answer(photo, "Which colour?")
    assert answer == Answerer(trainer.model.eval()).answer(photo, "Which colour?")
    whole = load_checkpoint(folder, overrides=root | {"llm.quantization": "none", "llm.device_map": "auto"})
    weight = whole.language_model.model.layers[0].mlp.down_proj.weight  # LoRA is merged into it
    assert weight.dtype == torch.float32
    Answerer(whole).answer(photo, "Which colour?")  # adapter and backbone have one device and dtype
    assert check_export(write_export(whole, tmp_path / "exported", "llava", FACTS))["passed"]


@needs_bitsandbytes
def test_4bit_weights_stay_as_they_are_on_every_cpu(claim_bf16, wide_qwen):
    outputs = []
    for has_bf16 in (False, True):
        claim_bf16(has_bf16)
        model = load_language_model(Path(wide_qwen), torch.float32, 0, 0, quantization="nf4").eval()
        layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        before = [layer.weight.data.clone() for layer in layers]
        with torch.no_grad():
            outputs.append(model(torch.tensor([[1, 2, 3]])).logits)
        assert all(torch.equal(layer.weight.data, data) for layer, data in zip(layers, before, strict=True))
        assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert torch.equal(*outputs)


@needs_bitsandbytes
def test_gradients_are_close_to_those_of_the_whole_weights(configure, wide_qwen):
    gradients = {}
    for quantization in ("none", "nf4", "int8"):
        trainer = Trainer(configure(llm={"path": wide_qwen, "quantization": quantization}))
        torch.manual_seed(0)
        for name, parameter in trainer.model.LLM.named_parameters():
            if "lora_B" in name:  # zeros at the start, behind which lora_A gets no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        trainer.forward(
            next(iter(make_loader(trainer.train_set, [[0, 1]], 0, trainer.accelerator.device))), None
        ).backward()
        gradients[quantization] = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients[quantization].values())
    for quantization, bound in (("nf4", 0.3), ("int8", 0.1)):
        distances = [relative(gradients[quantization][name], g) for name, g in gradients["none"].items()]
        assert sum(distances) / len(distances) < bound


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_layers_keep_no_inputs(wide_qwen, dtype):
    """Outputs and gradients are bitsandbytes' own, which keeps its inputs out of sight of gradient checkpointing."""
    model = load_language_model(Path(wide_qwen), dtype, 0, 0, quantization="int8")
    layer = model.model.layers[0].mlp.gate_proj
    own = type(layer).forward
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    sides = []
    for forward in (layer.forward, lambda given: own(layer, given)):
        output = forward(x)
        sides.append((output, *torch.autograd.grad(output.sin().sum(), x)))
    assert all(torch.equal(*pair) for pair in zip(*sides, strict=True))
    copy = x * 1
    kept = weakref.ref(copy)
    output = layer(copy)
    del copy
    assert kept() is None
    output.sum().backward()


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'llm.quantization' is nf4, which needs bitsandbytes: pip install"):
        loading_options(torch.float32, torch.device("cpu"), "nf4")


def test_training_refuses_a_spread_model(configure):
    with pytest.raises(ValueError, match=r"'llm.device_map': auto is for answering"):
        Trainer(configure(llm={"device_map": "auto"}))


def test_half_precision_keeps_the_rotary_frequencies(configure):
    trainer = Trainer(configure(max_steps=1))
    folder = trainer.run()
    model = load_checkpoint(folder, dtype=torch.bfloat16, overrides={"model_root": trainer.config.model_root})
    expected = trainer.model.language_model.model.rotary_emb.inv_freq
    actual = model.language_model.model.rotary_emb.inv_freq
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
