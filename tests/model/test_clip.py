"""A CLIP encoder in the whole model: its class token is what `visual.drop: first` leaves out; equal to stock LLaVA."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from answering.answer import Answerer
from exporting import vipllava
from model.model import MMultiModal
from tests.tiny import IMAGE_SIZE, fill_trained, tiny_config, write_clip
from visual.transform import load_image


@pytest.fixture(scope="module")
def clip_folder(backbones):
    return write_clip(backbones / "clip")


def build(backbones, clip_folder, **visual):
    torch.manual_seed(3)
    model = MMultiModal.from_config(tiny_config(backbones, visual={"path": str(clip_folder)} | visual)).eval()
    fill_trained(model)
    return model


def greedy_answer(model, photo, question):
    """By whole forward passes, without the answerer's cache."""
    ids, _ = model.processor.chat.render([model.processor.chat.typed_question(question, 1)])
    start = len(ids)
    while len(ids) < start + model.config.generate.max_new_tokens:
        logits = model(model.processor.transform(photo).unsqueeze(0), torch.tensor([ids])).logits[0, -1]
        logits[model.suppressed_ids] = -torch.inf
        if int(logits.argmax()) in model.processor.chat.stop_ids:
            break
        ids.append(int(logits.argmax()))
    assert len(ids) > start
    return model.processor.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("drop", [True, False])
@torch.no_grad()
def test_dropped_row_is_the_class_token(backbones, clip_folder, drop):
    model = build(backbones, clip_folder, drop="first" if drop else "none", image_tokens=16 if drop else 17)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    rows = model.encoder.encode(pixels)
    assert rows.shape[1] == 17
    assert model.processor.chat.plan.crop_tokens == 17 - drop
    assert torch.equal(model.encode_image(pixels), rows[:, int(drop) :])
    photo = load_image(backbones / "photos" / "0.png")
    assert Answerer(model).answer(photo, "Which colour?") == greedy_answer(model, photo, "Which colour?")


def test_wrong_image_tokens_are_refused(backbones, clip_folder):
    with pytest.raises(ValueError, match="'visual.image_tokens' is 17, but the encoder gives 16 rows .* makes 16"):
        build(backbones, clip_folder, image_tokens=17)


@torch.no_grad()
def test_equals_stock_llava(backbones, clip_folder):
    model = build(backbones, clip_folder)
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question("What is it?", 1)])[0]])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    model.LLM.merge_adapter()
    ours = model(pixels, ids).logits
    language_model = model.LLM.merge_and_unload()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**model.encoder.config.to_dict()),
        text_config=language_model.config,
        projector_hidden_act="gelu",
        image_token_index=model.processor.chat.image_token_id,
        image_token_id=model.processor.chat.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    other = LlavaForConditionalGeneration(config).eval()
    other.model.vision_tower.load_state_dict(model.encoder.state_dict())
    other.model.multi_modal_projector.linear_1.load_state_dict(model.feature_proj[0].state_dict())
    other.model.multi_modal_projector.linear_2.load_state_dict(model.feature_proj[2].state_dict())
    other.model.language_model.load_state_dict(language_model.model.state_dict())
    other.lm_head.load_state_dict(language_model.lm_head.state_dict())
    torch.testing.assert_close(ours, other(pixel_values=pixels, input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_the_class_with_a_layer_norm_in_front_is_refused(backbones, clip_folder):
    with pytest.raises(ValueError, match="the encoder is CLIPViT .* SigLIP's last one .*: use --format llava"):
        vipllava.TARGET.check(build(backbones, clip_folder))


def test_summary_counts(backbones, clip_folder):
    model = build(backbones, clip_folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    projector = 24 * 32 + 32 + 32 * 32 + 32
    lora = sum(parameter.numel() for name, parameter in model.LLM.named_parameters() if "lora_" in name)
    assert model.parameter_summary() == (
        f"{total:,} parameters, trained: projector {projector:,}, lora {lora:,}; frozen weights float32 on cpu"
    )
    assert not model.trains_encoder
