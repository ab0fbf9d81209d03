"""Gradients of a trained encoder: those of transformers' own modules, with and without recomputed activations."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, SiglipVisionModel

from batch import Batch
from model.model import LossOf, MMultiModal
from tests.batches import as_packed
from tests.tiny import IMAGE_SIZE, tiny_config, write_clip
from tests.visual.test_vit import write as write_tower
from training.loop import Trainer

MODES = {
    "lora": {"vision": {"mode": "lora", "lr": 1e-3}},
    "full": {"vision": {"mode": "full", "lr": 1e-3}},
    "all full": {"vision": {"mode": "full", "lr": 1e-3}, "llm": {"mode": "full", "lr": 1e-3}},
    "behind a frozen projector": {"vision": {"mode": "full", "lr": 1e-3}, "projector": {"lr": 0}},
}
SCALE = 2.0  # alpha / r below


def build(backbones, parts, visual=None):
    """A model in float64 whose trained weights do something, in training mode."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    config = tiny_config(
        backbones,
        visual={"path": str(visual or backbones / "siglip"), "lora": lora},
        train={"parts": {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}} | parts},
    )
    model = MMultiModal.from_config(config, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().train()


def photos_and_text(model, count=2):
    """Pixels, ids and labels of `count` questions with an answer, as a padded batch."""
    chat = model.processor.chat
    rows = [
        chat.render([chat.typed_question("What?" * number, 1), chat.answer("that")]) for number in range(1, count + 1)
    ]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)).double()
    return pixels, ids, labels, mask


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_weights(leaves, root, module):
    """Weights of `module` by transformers' names, with LoRA multiplied out, as functions of `leaves`."""
    weights = {}
    for name, weight in leaves.items():
        if not name.startswith(root) or "lora_" in name:
            continue
        name = name.removeprefix(root)
        if ".base_layer." in name:
            A, B = (
                (leaves[root + name.replace("base_layer", f"lora_{factor}.default")] for factor in "AB")
                if name.endswith("weight")
                else (None, None)
            )
            weight = weight if A is None else weight + SCALE * B @ A
            name = name.replace(".base_layer", "")
        weights[name] = weight
    assert weights.keys() == dict(module.named_parameters()).keys()
    return weights


@pytest.mark.parametrize("kind", MODES)
def test_gradients_equal_those_of_the_library_modules(backbones, kind):
    """transformers' SiglipVisionModel and Qwen2ForCausalLM, photos put in place by hand, LoRA as a sum of matrices."""
    model = build(backbones, MODES[kind])
    pixels, ids, labels, mask = photos_and_text(model)
    loss = model.loss(as_packed(pixels, ids, labels, mask))
    loss.backward()

    leaves = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    siglip = SiglipVisionModel.from_pretrained(backbones / "siglip", vision_use_head=False).double()
    qwen = AutoModelForCausalLM.from_pretrained(backbones / "qwen").double()
    rows = functional_call(siglip, whole_weights(leaves, "encoder.", siglip), (pixels,)).last_hidden_state[:, 1:]
    first, last = ((leaves[f"feature_proj.{n}.weight"], leaves[f"feature_proj.{n}.bias"]) for n in (0, 2))
    images = nn.functional.linear(nn.functional.gelu(nn.functional.linear(rows, *first)), *last)
    root = "LLM." if kind == "all full" else "LLM.base_model.model."
    weights = whole_weights(leaves, root, qwen)
    embeddings = nn.functional.embedding(ids, weights["model.embed_tokens.weight"])
    is_image = (ids == model.processor.chat.image_token_id).unsqueeze(-1)
    embeddings = torch.where(is_image, 0.0, embeddings).masked_scatter(is_image, images)
    logits = functional_call(qwen, weights, kwargs={"inputs_embeds": embeddings, "attention_mask": mask}).logits
    # their own loss would round to float32
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in gradients(model).items():
        # relative in norm; float64 sums in another order, and key biases, whose gradient is 0 but for rounding
        error = (gradient - leaves[name].grad).norm()
        assert error < 1e-6 * leaves[name].grad.norm() + 1e-12, name


TOWERS = {"siglip": None, "vit": lambda folder: write_tower(folder, "vit"), "clip": write_clip}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(backbones, tmp_path, tower, kind):
    visual = TOWERS[tower] and TOWERS[tower](tmp_path / tower)
    parts = {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}} | MODES[kind]
    train = {"output_dir": str(tmp_path / "run"), "parts": parts, "trackers": []}
    lora = {"dropout": 0.2}
    config = tiny_config(backbones, visual={"path": str(visual or backbones / "siglip"), "lora": lora}, train=train)
    trainer = Trainer(config)
    model, found, calls = trainer.model.train(), [], []
    layer = next(
        module for name, module in model.encoder.named_modules() if name.endswith(".0") and name.count("layer")
    )
    norm = next(module for module in layer.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_hook(lambda *_: calls.append(1))
    batch = as_packed(*(tensor if tensor.dtype == torch.int64 else tensor.float() for tensor in photos_and_text(model)))
    for on in (False, True, False):
        trainer.set_checkpointing(on)
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)  # of dropout
        model.loss(batch).backward()
        found.append(gradients(model))
        assert len(calls) == (2 if on else 1)  # once more in the backward pass
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_weights_that_the_output_does_not_need_get_a_gradient_too(backbones, tmp_path, tower):
    """CLIP's last norm, DINOv2's mask token: several processes wait for the gradient of every trained weight."""
    visual = write_clip(tmp_path / "clip") if tower == "clip" else write_tower(tmp_path / "dinov2", "dinov2")
    model = build(backbones, MODES["full"], visual)
    pixels, ids, labels, mask = photos_and_text(model)
    LossOf(model)(as_packed(pixels, ids, labels, mask), 1).backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    text = ids[:1, :5]
    batch = Batch(text, text.roll(1), torch.arange(5)[None], ((5,),))
    model.zero_grad()
    LossOf(model)(batch, 1).backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
