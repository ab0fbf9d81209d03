"""LoRA is added to the weights for answering where that rounds nothing away, and stays apart everywhere else."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from answering.answer import Answerer
from model.checkpoint import load_checkpoint, save_checkpoint
from model.checkpoint_folder import checksum
from model.model import MMultiModal
from tests.tiny import IMAGE_SIZE, fill_trained, tiny_config

# float32 sums in another order, as in test_parity.py: logits of size 1 to 10
TOLERANCE = 1e-4
QUESTIONS = ("What is it?", "Which colour has it?", "再说一遍。")


def build(backbones, language_model="qwen2-tied", vision="frozen", **lora):
    config = tiny_config(
        backbones,
        llm={"path": str(backbones / language_model), "lora": {"r": 4, "alpha": 8, "dropout": 0.1} | lora},
        train={"parts": {"vision": {"mode": vision}}},
    )
    model = MMultiModal.from_config(config, device="cpu", dtype=torch.float32).eval()
    fill_trained(model)
    return model


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def logits(model):
    chat = model.processor.chat
    ids = torch.tensor([chat.render([chat.typed_question("What?", 1)])[0]])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return model(pixels, ids).logits


def answers(model):
    answerer, photo = Answerer(model), Image.new("RGB", (64, 50), (220, 20, 20))
    return [answerer.answer(photo, question) for question in QUESTIONS]


@pytest.mark.parametrize("language_model", ["qwen2-tied", "qwen2-untied", "qwen3-tied", "llama-tied", "qwen1"])
@pytest.mark.parametrize("vision", ["frozen", "lora"])
def test_the_same_logits_and_answers(language_model, vision, backbones):
    model = build(backbones, language_model, vision)
    wanted, texts = logits(model), answers(model)
    with model.LLM.disable_adapter():  # else LoRA that does nothing would pass
        assert not torch.allclose(logits(model), wanted, atol=0.1)
    model.merge_lora()
    assert not lora_layers(model)
    assert [part.name for part in model.parts] == ["projector"]
    torch.testing.assert_close(logits(model), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert answers(model) == texts


def test_the_same_weights_as_pefts_own_merge(backbones):
    ours, theirs = build(backbones), build(backbones)
    ours.merge_lora()
    expected = theirs.LLM.merge_and_unload().state_dict()
    assert ours.LLM.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.LLM.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_unmerged(dtype, backbones):
    """A trained change smaller than half a step of bf16 would be lost from every weight that it is added to."""
    model = build(backbones)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.merge_lora()
    assert isinstance(model.LLM, PeftModel)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert [part.name for part in model.parts] == ["projector", "lora"]


def test_lora_on_an_output_matrix_that_is_the_input_matrix_too_stays_apart(backbones):
    model = build(backbones, "qwen2-tied", target_modules=["q_proj", "lm_head"])
    embedding = model.language_model.get_input_embeddings().weight
    wanted, before = logits(model), embedding.clone()
    model.merge_lora()
    assert torch.equal(embedding, before)
    assert torch.equal(logits(model), wanted)
    untied = build(backbones, "qwen2-untied", target_modules=["q_proj", "lm_head"])
    wanted = logits(untied)
    untied.merge_lora()
    assert not lora_layers(untied)
    torch.testing.assert_close(logits(untied), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_loading_merges_unless_told_otherwise_and_leaves_all_files_alone(backbones, tmp_path):
    model = build(backbones, vision="lora")
    save_checkpoint(model, tmp_path / "checkpoint-1", {}, {"commit": None}, {})
    files = [file for root in (backbones, tmp_path) for file in Path(root).rglob("*.safetensors")]
    before = [checksum(file) for file in files]
    overrides = {"model_root": backbones}
    merged = load_checkpoint(tmp_path / "checkpoint-1", "cpu", overrides=overrides)
    apart = load_checkpoint(tmp_path / "checkpoint-1", "cpu", overrides=overrides, merge_lora=False)
    half = load_checkpoint(tmp_path / "checkpoint-1", "cpu", torch.bfloat16, overrides)
    assert not lora_layers(merged)
    assert len(lora_layers(apart)) == len(lora_layers(half)) == len(lora_layers(model)) > 0
    assert torch.equal(logits(apart), logits(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=TOLERANCE, atol=TOLERANCE)
    assert [checksum(file) for file in files] == before
