"""Our logits, loss and greedy tokens against transformers' LLaVA classes on the same weights."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from exporting.folder import text_config
from model.model import MMultiModal
from tests.batches import as_packed
from tests.tiny import IMAGE_SIZE, fill_trained, tiny_config

# float32 sums in another order: 1e-5 is about 100 ulp of logits of size 1 to 10
TOLERANCE = 1e-5


@pytest.fixture(params=["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-tied", "qwen1"])
def model(request, backbones):
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(backbones / request.param)})).eval()
    fill_trained(model)
    return model


def reference(model, kind):
    """transformers' class with our weights, LoRA merged."""
    language_model = model.LLM.merge_and_unload()
    vision_config = SiglipVisionConfig(**model.encoder.config.to_dict())
    settings = {"vision_config": vision_config, "projector_hidden_act": "gelu"}
    settings["text_config"] = text_config(language_model)
    settings |= {
        "image_token_index": model.processor.chat.image_token_id,
        "image_token_id": model.processor.chat.image_token_id,
    }
    if kind == "vip":
        config = VipLlavaConfig(
            **settings, vision_feature_layers=-1, projector_layernorm_eps=vision_config.layer_norm_eps
        )
        other = VipLlavaForConditionalGeneration(config)
        other.model.multi_modal_projector.projector_layernorm.load_state_dict(model.encoder.post_layernorm.state_dict())
    else:
        vision_config.tie_last_hidden_states = True
        config = LlavaConfig(**settings, vision_feature_layer=-1, vision_feature_select_strategy="default")
        other = LlavaForConditionalGeneration(config)
    other = other.eval()
    other.model.vision_tower.load_state_dict(model.encoder.state_dict())
    other.model.multi_modal_projector.linear_1.load_state_dict(model.feature_proj[0].state_dict())
    other.model.multi_modal_projector.linear_2.load_state_dict(model.feature_proj[2].state_dict())
    other.model.language_model.load_state_dict(language_model.model.state_dict())
    other.lm_head.load_state_dict(language_model.lm_head.state_dict())
    return other


def batch(model):
    """Two photos in the first row, one in the second, none in the third; right-padded."""
    chat = model.processor.chat
    dialogues = [
        [chat.typed_question("Same?", 2), chat.answer("no")],
        [chat.typed_question("Which colour is it?", 1), chat.answer("red")],
        [chat.typed_question("Hello", 0), chat.answer("hi")],
    ]
    rendered = [chat.render(dialogue) for dialogue in dialogues]
    length = max(len(ids) for ids, _ in rendered)
    pad = min(chat.stop_ids)
    input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rendered])
    labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rendered])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rendered])
    torch.manual_seed(4)
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE), input_ids, labels, mask


@pytest.mark.parametrize("kind", ["vip", "llava"])
@torch.no_grad()
def test_logits_loss_and_greedy_tokens(model, kind):
    if kind == "llava" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 has no tie_last_hidden_states: its LLaVA leaves out the post layer norm")
    image, input_ids, labels, mask = batch(model)
    unmerged = model(image, input_ids, labels, attention_mask=mask).logits
    model.LLM.merge_adapter()  # adding LoRA to the weights rounds by itself, so both sides use the merged ones
    ours = model(image, input_ids, labels, attention_mask=mask)
    torch.testing.assert_close(unmerged, ours.logits, rtol=1e-4, atol=1e-4)
    packed = as_packed(image, input_ids, labels, mask)
    supervised, packed_logits = model.loss(packed), model.logits(packed)
    last = model(image, input_ids, attention_mask=mask, logits_to_keep=1)
    chat = model.processor.chat
    prompt = torch.tensor([chat.render([chat.typed_question("What is it?", 1)])[0]])
    our_tokens = model.generate(image[:1], prompt, max_new_tokens=12, do_sample=False)

    other = reference(model, kind)
    theirs = other(pixel_values=image, input_ids=input_ids, labels=labels, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(supervised, theirs.loss, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(packed_logits[0], theirs.logits[real], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(last.logits, ours.logits[:, -1:])
    their_tokens = other.generate(
        pixel_values=image[:1],
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=sorted(model.processor.chat.stop_ids),
        pad_token_id=min(model.processor.chat.stop_ids),
        suppress_tokens=[
            model.processor.chat.image_token_id,
            *range(len(model.processor.tokenizer), other.lm_head.weight.shape[0]),
        ],
    )[:, prompt.shape[1] :]
    assert torch.equal(our_tokens, their_tokens)


def test_wrong_number_of_placeholders_raises_with_both_numbers(model):
    image, input_ids, _, mask = batch(model)
    with pytest.raises(ValueError, match="45 image placeholders .* 30 image features"):
        model(image[:2], input_ids, attention_mask=mask)
    with pytest.raises(ValueError, match="45 image placeholders .* 0 image features"):
        model(None, input_ids, attention_mask=mask)


def test_cached_features_give_the_same_logits(model):
    packed = as_packed(*batch(model))
    ours = model.logits(packed)
    packed.image_features, packed.pixel_values = model.encode_image(packed.pixel_values), None
    assert not packed.image_features.requires_grad
    torch.testing.assert_close(model.logits(packed), ours)


def test_dropped_token_is_the_top_left_patch(model):
    image = batch(model)[0]
    whole = model.encoder.encode(image)
    assert whole.shape == (3, 16, 24)
    assert torch.equal(model.encode_image(image), whole[:, 1:])


def test_config_that_disagrees_with_the_encoder_is_an_error(backbones):
    with pytest.raises(ValueError, match="'visual.image_tokens' is 728, but the encoder gives 15 rows .* makes 15"):
        MMultiModal.from_config(tiny_config(backbones, visual={"image_tokens": 728}))
