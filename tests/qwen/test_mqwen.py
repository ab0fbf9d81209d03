"""Fusion counts both sides; the loss on supervised positions equals the full one; loading is strict."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import modeling_utils

from compat import set_activation_checkpointing
from qwen.attention import register_attention
from qwen.loading import load_language_model
from qwen.Mqwen import LOSS_ROWS, fuse_image_features
from qwen.Mqwen import supervised_loss as loss_of_rows
from qwen.tokenizer import image_token_id, load_tokenizer
from tests.tiny import write_qwen


def supervised_loss(hidden, labels, head, num_items):
    """The loss of whole sequences (B, T, Dl) with labels (B, T)."""
    wanted = labels[:, 1:] != -100
    return loss_of_rows(hidden[:, :-1][wanted], labels[:, 1:][wanted], head, num_items)


def test_fusion_puts_rows_in_reading_order():
    embeddings = torch.zeros(2, 4, 3)
    is_image = torch.tensor([[False, True, True, False], [True, True, False, False]])
    features = torch.arange(1.0, 13.0).view(2, 2, 3)  # two photos of two tokens
    fused = fuse_image_features(embeddings, features, is_image)
    assert torch.equal(fused[0, 1:3], features[0])
    assert torch.equal(fused[1, :2], features[1])
    assert fused[~is_image].abs().sum() == 0
    assert embeddings.abs().sum() == 0  # the input is left as it was


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_fusion_raises_with_both_numbers(num_images):
    is_image = torch.tensor([[True, True, True, True]])
    with pytest.raises(ValueError, match=rf"4 image placeholders .* {num_images * 2} image features"):
        fuse_image_features(torch.zeros(1, 4, 3), torch.zeros(num_images, 2, 3), is_image)


def test_supervised_loss_equals_full_cross_entropy():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 7, 8, requires_grad=True), torch.nn.Linear(8, 11, bias=False)
    labels = torch.tensor([[-100, -100, 3, 4, -100, 5, 6], [-100, 1, -100, -100, -100, -100, -100]])
    loss = supervised_loss(hidden, labels, head, None)
    expected = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(supervised_loss(hidden, labels, head, 10), expected * 5 / 10)
    gradients = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert supervised_loss(hidden, torch.full_like(labels, -100), head, None) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunked_loss_equals_the_plain_one(monkeypatch, dtype, tolerance, frozen):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(not frozen)
    hidden = torch.randn(2, 40, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (2, 40))
    labels[:, :5] = -100
    wanted = (hidden,) if frozen else (hidden, head.weight)
    plain = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected = [gradient * 512 / 70 for gradient in torch.autograd.grad(plain, wanted)]
    for rows in (1, 7, 70, 256):
        monkeypatch.setattr("qwen.Mqwen.LOSS_ROWS", rows)
        loss = supervised_loss(hidden, labels, head, 70)
        assert loss.dtype == dtype
        assert abs(loss * 70 - plain) <= tolerance * plain
        for ours, theirs in zip(torch.autograd.grad(loss * 512, wanted), expected, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    with torch.no_grad():
        assert torch.equal(supervised_loss(hidden, labels, head, 70), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast(monkeypatch, dtype):
    """As near to the exact gradient as the plain way in that dtype, also where a loss scaler multiplies it."""
    torch.manual_seed(0)
    monkeypatch.setattr("qwen.Mqwen.LOSS_ROWS", 9)
    head = torch.nn.Linear(16, 5000, bias=False).to(dtype).requires_grad_(False)
    hidden = torch.randn(1, 40, 16, requires_grad=True)
    labels = torch.randint(0, 5000, (1, 40))
    double = head.weight.double()
    exact = functional.cross_entropy((hidden.double() @ double.T)[0, :-1], labels[0, 1:])
    with torch.autocast("cpu", dtype=dtype):
        loss = supervised_loss(hidden, labels, head, None)
        plain = functional.cross_entropy(head(hidden)[0, :-1].float(), labels[0, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    reference, ours, theirs = (torch.autograd.grad(value * 1024, hidden)[0] for value in (exact, loss, plain))
    assert (ours - reference).norm() <= 1.2 * (theirs - reference).norm() + 1e-3 * reference.norm()


def test_logits_of_long_answers_are_never_in_memory_together():
    head = torch.nn.Linear(8, 3000, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 2049, 8, requires_grad=True)
    labels = torch.randint(0, 3000, (1, 2049))
    with torch.profiler.profile(profile_memory=True) as profile:
        supervised_loss(hidden, labels, head, None).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * LOSS_ROWS * 3000 * 4  # 2,048 rows of logits would be eight chunks


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_strict_loading_names_the_tensor(tmp_path, kind):
    folder = write_qwen(tmp_path / "qwen", kind)
    tokenizer = load_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'llm.path'.*missing: model.layers.1.mlp.up_proj.weight"):
        load_language_model(folder, torch.float32, image_token_id(tokenizer), len(tokenizer))


def test_cudnn_plans_no_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    register_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="of type 'gpt2'; supported: qwen, qwen2, qwen3, llama"):
        load_language_model(tmp_path, torch.float32, 1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_placeholder_takes_a_spare_row_and_resizes_only_without_one(tmp_path, tied):
    for spare_rows, grows in ((8, False), (0, True)):
        folder = write_qwen(tmp_path / f"{spare_rows}", tied=tied, spare_rows=spare_rows)
        tokenizer = load_tokenizer(folder)
        before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        model = load_language_model(folder, torch.float32, image_token_id(tokenizer), len(tokenizer))
        rows = model.get_input_embeddings().weight
        assert rows.shape[0] == before.shape[0] + int(grows)
        assert model.lm_head.weight.shape[0] == rows.shape[0]
        assert torch.equal(rows[: before.shape[0]], before)


class TestActivationCheckpointing:
    def test_switches_without_a_warning(self, tmp_path):
        model = load_language_model(write_qwen(tmp_path), torch.float32, 0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for on in (True, False):
                set_activation_checkpointing(model, on)
                assert [layer.gradient_checkpointing for layer in model.model.layers] == [on, on]


def test_new_rows_of_the_embedding_come_quietly(tmp_path, monkeypatch):
    rows = load_language_model(write_qwen(tmp_path), torch.float32, 0, 0).get_input_embeddings().num_embeddings
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    model = load_language_model(tmp_path, torch.float32, 0, rows + 3)
    assert model.get_input_embeddings().num_embeddings == rows + 3
    assert not said
