"""Qwen v1 checkpoints are Qwen2 models up to `seq_length`, and beyond it what their own code makes of them."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2ForCausalLM

from batch import sample_positions
from paths import REPO_ROOT
from qwen.loading import load_language_model
from qwen.qwen1 import MAX_LENGTH, Qwen1Config, logn_scale, ntk_alpha, read_config
from qwen.tokenizer import load_tokenizer, read_tiktoken
from tests.tiny import write_qwen1

SEQ_LENGTH = 16  # the tests' models leave their training length after so many tokens


def load(folder, dtype=torch.float32):
    return load_language_model(folder, dtype, 303, 0).eval()


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_tensor_finds_its_place(tmp_path, dtype, shards, binary):
    expected = write_qwen1(tmp_path, dtype, shards, binary)
    model = load(tmp_path, dtype)
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    if dtype == torch.float32:
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("transformer.h.1.mlp.w1.weight"), "missing: model.layers.1.mlp.up_proj.weight"),
        (lambda weights: weights.pop("transformer.h.0.attn.c_attn.bias"), "missing: model.layers.0.self_attn.k_proj.b"),
        (lambda weights: weights.update({"transformer.h.7.ln_1.weight": torch.ones(32)}), "left over: .*layers.7"),
        (lambda weights: weights.update({"lm_head.weight": torch.ones(8, 32)}), "wrong shape: .*lm_head"),
    ],
)
def test_strict_loading(tmp_path, change, message):
    write_qwen1(tmp_path, shards=1)
    file = tmp_path / "model-00001-of-00001.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"'llm.path'.*{message}"):
        load(tmp_path)


def test_settings_no_published_model_has_are_refused(tmp_path):
    write_qwen1(tmp_path, rotary_pct=0.25)
    with pytest.raises(ValueError, match="has rotary_pct=0.25, only 1.0 is supported"):
        load(tmp_path)


def written_out(expected: Qwen2ForCausalLM, alpha: float) -> None:
    """Make a Qwen2 do the arithmetic of the original beyond its training length, by other means than ours."""
    config = expected.config
    width = config.hidden_size // config.num_attention_heads
    base = 10000.0 * alpha ** (width / (width - 2))
    expected.model.rotary_emb.inv_freq = 1.0 / base ** (torch.arange(0, width, 2).float() / width)

    def scale_queries(module, inputs, output):
        factors = [math.log(i, SEQ_LENGTH) if i > SEQ_LENGTH else 1.0 for i in range(1, output.shape[1] + 1)]
        return output * torch.tensor(factors)[:, None]  # before the rotation, which is linear

    for layer in expected.model.layers:
        layer.self_attn.q_proj.register_forward_hook(scale_queries)


@pytest.mark.parametrize(("length", "alpha"), [(16, 1), (17, 3), (32, 3), (33, 7), (64, 7), (100, 15)])
@torch.no_grad()
def test_beyond_the_training_length(tmp_path, length, alpha):
    expected = write_qwen1(tmp_path, seq_length=SEQ_LENGTH).eval()
    model = load(tmp_path)
    assert ntk_alpha(length, model.config) == alpha
    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(length))
    plain = expected(ids).logits
    torch.testing.assert_close(model.train()(ids).logits, plain, rtol=1e-4, atol=1e-4)
    written_out(expected, alpha)
    logits = model.eval()(ids).logits
    torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert length == SEQ_LENGTH or (logits - plain).abs().max() > 1e-2


@torch.no_grad()
def test_cached_keys_keep_their_base(tmp_path):
    write_qwen1(tmp_path, seq_length=SEQ_LENGTH)
    model = load(tmp_path)
    cache = DynamicCache(config=model.config)
    ids = torch.arange(20)[None]
    model(ids, past_key_values=cache, use_cache=True)
    next_logits = model(torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits
    whole = model(torch.cat([ids, torch.tensor([[5]])], 1)).logits[:, -1:]
    torch.testing.assert_close(next_logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_too_long_is_refused_and_not_answered_differently(tmp_path):
    write_qwen1(tmp_path, seq_length=SEQ_LENGTH)
    model = load(tmp_path)
    with pytest.raises(ValueError, match=f"{MAX_LENGTH + 1} tokens: Qwen v1 reads at most {MAX_LENGTH}"):
        logn_scale(torch.tensor([[MAX_LENGTH]]), model.config)
    embeddings = model.embed(torch.arange(20)[None])

    def states(samples):
        positions = torch.cat([sample_positions(lengths) for lengths in samples])[None]
        return model.packed_states(embeddings, positions, samples)

    with pytest.raises(ValueError, match="lower data.max_length to 16"):
        states(((14, 3, 3),))
    states(((13, 3), (4,)))  # long together, each of them short


def test_config_without_either_extension(tmp_path):
    write_qwen1(tmp_path, seq_length=SEQ_LENGTH, use_dynamic_ntk=False, use_logn_attn=False)
    config = read_config(tmp_path)
    assert ntk_alpha(100, config) == 1
    assert logn_scale(torch.arange(100)[None], config) is None


MEASURE = """
import resource, sys, torch
from pathlib import Path
from qwen.loading import load_language_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_language_model(Path(sys.argv[1]), torch.bfloat16, 303, 0)  # whatever loading needs once
before = peak()
model = load_language_model(Path(sys.argv[2]), torch.bfloat16, 303, 0)
print((peak() - before) / sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak of resident memory")
@pytest.mark.parametrize("binary", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["safetensors", "bin"])
def test_loading_needs_little_more_than_the_weights(tmp_path, binary):
    write_qwen1(tmp_path / "small", torch.bfloat16)
    wide = {"vocab_size": 20000, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    write_qwen1(tmp_path / "wide", torch.bfloat16, shards=2, binary=binary, **wide)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "wide")]
    output = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True).stdout
    assert float(output) < 1.25


def brute_force(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's algorithm: join the neighbours that make the token of lowest rank, until none do."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [(ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1)]
        rank, at = min(joined, default=(math.inf, 0))
        if rank == math.inf:
            return [ranks[part] for part in parts]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_tiktoken_file_gives_tiktokens_ids(tmp_path):
    write_qwen1(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    lines = (tmp_path / "qwen.tiktoken").read_bytes().splitlines()
    import base64

    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    for word in ("ABCAB", "AAAA", "BAAB", "ZZZ", "AAB", "ABBA"):
        assert tokenizer.encode(word, add_special_tokens=False) == brute_force(ranks, word.encode())
    assert tokenizer.convert_tokens_to_ids("<|extra_0|>") == 303
    assert len(tokenizer) == 508


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"QQ==\n", "line 1: not a token"), (b"QQ== 0\n", "ranks are missing"), (b"Q!== 0\n", "line 1")],
)
def test_damaged_tiktoken_file(tmp_path, content, message):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=rf"qwen\.tiktoken.*{message}"):
        read_tiktoken(tmp_path / "qwen.tiktoken")


def test_log_n_needs_no_float64():
    """Apple's MPS has none."""
    config, seen = Qwen1Config(), set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            output = function(*arguments, **(settings or {}))
            seen.add(getattr(output, "dtype", None))
            return output

    positions = torch.arange(20_000, 20_300)[None]
    with Dtypes():
        actual = logn_scale(positions, config)
    assert torch.float64 not in seen
    expected = (positions + 1).double().log() / math.log(config.seq_length)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
