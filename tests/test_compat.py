"""Each use of what a library does not promise to keep: a change of the library is seen here by name."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import compat
from qwen.lora import LoraLinear
from tests.tiny import write_qwen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def model(folder):
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_activation_checkpointing_recomputes_the_layers(model):
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for on, expected in ((True, 2), (False, 1)):
        compat.set_activation_checkpointing(model.train(), on)
        calls.clear()
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert len(calls) == expected


def test_activation_checkpointing_by_its_older_name():
    calls = []
    old = types.SimpleNamespace(
        gradient_checkpointing_enable=calls.append, gradient_checkpointing_disable=lambda: calls.append("off")
    )
    compat.set_activation_checkpointing(old, True)
    compat.set_activation_checkpointing(old, False)
    assert calls == [{"use_reentrant": False}, "off"]


def test_weight_names_are_renamed_and_split(folder, tmp_path):
    class Renamed(Qwen2ForCausalLM):
        pass

    tensors = load_file(folder / "model.safetensors")
    fused = {}
    for name, tensor in tensors.items():
        if ".gate_proj." in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            fused[name.replace("model.layers.", "stack.").replace("gate_proj", "both")] = torch.cat([tensor, up])
        elif ".up_proj." not in name:
            fused[name.replace("model.layers.", "stack.")] = tensor
    save_file(fused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    compat.register_weight_names(
        "Renamed", {r"stack\.": "model.layers."}, {"mlp.both": ("mlp.gate_proj", "mlp.up_proj")}
    )
    loaded, info = Renamed.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    own = loaded.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@torch.no_grad()
def test_the_prefix_of_a_cache_and_the_cache_go_on_on_their_own(model):
    model.eval()
    ids, others = torch.arange(1, 9)[None], torch.arange(8, 0, -1)[None]
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    prefix, whole = compat.cache_prefix(cache, 5), compat.cache_prefix(cache, 9)  # there are no 9
    assert [one.get_seq_length() for one in (cache, prefix, whole)] == [8, 5, 8]
    for one, read in ((prefix, ids[:, :5]), (cache, ids), (whole, ids), (prefix, torch.cat([ids[:, :5], others], 1))):
        logits = model(others, past_key_values=one).logits
        torch.testing.assert_close(logits, model(torch.cat([read, others], 1)).logits[:, -8:])
    storages = [layer.keys.untyped_storage().data_ptr() for one in (cache, prefix, whole) for layer in one.layers]
    assert len(set(storages)) == len(storages)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_our_lora_layer_is_used(model):
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    compat.use_lora_layer(settings, LoraLinear, torch.nn.Linear)
    assert type(get_peft_model(model, settings).get_base_model().model.layers[0].self_attn.q_proj) is LoraLinear


def test_the_wrapper_sends_the_rest_alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    compat.send_no_gradients_of(module, ["0.weight", "0.bias"])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        wrapped(torch.ones(1, 2)).sum().backward()
        assert wrapped.parameters_to_ignore == {"0.weight", "0.bias"}
    finally:
        torch.distributed.destroy_process_group()


def test_pillow_processors_have_the_settings_that_are_read():
    settings = {"size": {"height": 4, "width": 4}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    read = {"do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    for name in ("SiglipImageProcessorPil", "CLIPImageProcessorPil", "ViTImageProcessorPil", "BitImageProcessorPil"):
        assert read <= getattr(compat, name)(**settings).to_dict().keys()


def test_onednn_says_yes_or_no():
    assert compat.onednn_has_bf16() in (True, False)


@pytest.mark.skipif(not compat.has_fp16_product(), reason="torch has no products with fp16 weights here")
@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_products_with_fp16_weights(bias):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 3, generator=generator) for rows in (5, 4))
    packed = compat.fp16_pack(weight, bias)
    assert torch.equal(compat.fp16_unpack(packed)[0], weight.half().float())
    expected = torch.nn.functional.linear(x, weight.half().float(), bias)
    torch.testing.assert_close(compat.fp16_product(x, packed), expected)
    torch.testing.assert_close(compat.fp16_product(x.view(2, 2, 3), packed), expected.view(2, 2, 5))


def test_flash_attention_takes_what_it_is_given():
    """The kernels need a GPU (`tests/qwen/test_varlen.py`); their arguments can be compared without."""
    ends = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    forward, backward = (
        [argument.name for argument in operation.default._schema.arguments]
        for operation in (torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
    )
    assert forward[:10] == ["query", "key", "value", *ends, "return_debug_mask"]
    assert backward[:14] == ["grad_out", "query", "key", "value", "out", "logsumexp", *ends, "rng_state", "unused"]
    for names in (forward, backward):
        assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    assert len(torch.ops.aten._flash_attention_forward.default._schema.returns) == 5


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_norm_is_qwen2_s_in_the_dtype_of_its_input(autocast):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 5, 16), (16,)))
    hidden.requires_grad_()
    norm = Qwen2RMSNorm(16, eps=1e-6)
    norm.weight.data = weight.double()
    expected = norm(hidden.detach().double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = compat.fused_rms_norm(hidden, weight, 1e-6)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 4e-3 * expected.norm()  # half a step of 8 bits
    found.sum().backward()
    assert hidden.grad is not None
