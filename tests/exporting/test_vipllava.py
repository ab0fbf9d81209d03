"""An exported folder loads with transformers alone and says the same, pictures and prompts included."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, VipLlavaForConditionalGeneration

from answering.answer import Answerer
from exporting.vipllava import export_checkpoint
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config


def scattered(backbones, name, **prompt):
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(backbones / name)}, prompt=prompt)).eval()
    fill_trained(model)
    return model


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-untied", "qwen1"])
def test_exported_model_answers_the_same(backbones, tmp_path, name):
    model = scattered(backbones, name, system="Sei kurz. it's", question_prefix="用中文回答：")
    photo = Image.new("RGB", (80, 60), (30, 160, 90))
    expected = Answerer(model).answer(photo, "What is it?")
    chat = model.processor.chat
    prompt, _ = chat.render([chat.typed_question("A?", 1), chat.answer("b"), chat.typed_question("What is it?", 0)])
    assert export_checkpoint(model, tmp_path / "out") < 1e-4

    exported = VipLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "What is it?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|extra_0|>", "<|extra_0|>" * model.processor.chat.plan.crop_tokens)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt
    ids = torch.tensor([chat.render([chat.typed_question("What is it?", 1)])[0]])
    tokens = exported.generate(
        pixel_values=model.processor.transform(photo)[None],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        suppress_tokens=model.suppressed_ids,
        max_new_tokens=model.config.generate.max_new_tokens,
    )[0, ids.shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == expected


def test_a_large_model_is_cut_into_shards(backbones, tmp_path, monkeypatch):
    monkeypatch.setattr("exporting.vipllava.SHARD_SIZE", "30KB")
    assert export_checkpoint(scattered(backbones, "qwen2-untied"), tmp_path / "out") < 1e-4
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    table = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(table["weight_map"].values())) == shards
    assert len(shards) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_refuses_what_the_stock_class_cannot_say(backbones, tmp_path):
    config = tiny_config(backbones, visual={"drop": "none"})
    with pytest.raises(ValueError, match="'visual.drop' is none"):
        export_checkpoint(MMultiModal.from_config(config), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(scattered(backbones, "qwen"), tmp_path / "there")
