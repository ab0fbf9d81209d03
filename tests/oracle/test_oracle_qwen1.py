"""Our public classes against the stored outputs of the original Qwen v1 code and of the report's public ancestor.

Tolerance 2e-4 on logits of size 1 to 10, float32 on both sides: sums in another order differ by 5e-6, the smallest
mistake we know of, the wrong GELU, by 3.5e-3 (`README.md` beside the arrays).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from answering.answer import Answerer
from config import Prompt
from model.checkpoint import load_checkpoint
from model.model import MMultiModal
from paths import REPO_ROOT
from qwen.chat import ChatFormat, Message
from qwen.loading import load_language_model
from qwen.tokenizer import load_tokenizer
from tests.batches import as_packed
from tests.tiny import write_tiktoken
from visual.transform import load_image

ORACLE = REPO_ROOT.parent / "shared" / "oracle"
TOLERANCE = {"rtol": 0, "atol": 2e-4}

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no stored outputs at {ORACLE}")


def write_checkpoints(folder: Path, arguments: Path, *more: str) -> Path:
    """Run the script that stands beside the stored outputs and knows how their weights were drawn."""
    script = ORACLE / "write_checkpoint.py"
    command = [sys.executable, str(script), "--args", str(arguments), "--out", str(folder), *more]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def stored():
    return np.load(ORACLE / "expected.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stored):
    folder = write_checkpoints(tmp_path_factory.mktemp("oracle"), ORACLE / "args.json")
    # any words do; with so many of them the placeholder has the id the outputs were made with
    write_tiktoken(folder / "qwen", int(stored["mm.eos_id"]))
    return folder


@pytest.fixture(scope="module")
def language_model(folder, stored):
    return load_language_model(folder / "qwen", torch.float32, int(stored["mm.image_token_id"]), 0).eval()


@pytest.fixture(scope="module")
def model(folder):
    return from_report(folder)


def from_report(folder: Path) -> MMultiModal:
    overrides = {"visual.path": folder / "siglip", "llm.path": folder / "qwen"}
    return load_checkpoint(folder / "checkpoint-36000", "cpu", overrides=overrides, merge_lora=False)


def check_logits(logits: torch.Tensor, stored, name: str) -> None:
    """Stored are some columns, and of the whole vocabulary the largest, the log-sum-exp and the lead of the first."""
    logits = logits.detach().float()
    torch.testing.assert_close(logits[..., stored["vocab_cols"]], torch.from_numpy(stored[f"{name}.cols"]), **TOLERANCE)
    torch.testing.assert_close(logits.logsumexp(-1), torch.from_numpy(stored[f"{name}.lse"]), **TOLERANCE)
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    torch.testing.assert_close(first - second, torch.from_numpy(stored[f"{name}.margin"]), rtol=0, atol=4e-4)
    sure = stored[f"{name}.margin"] > 4e-4
    assert (logits.argmax(-1).numpy() == stored[f"{name}.argmax"])[sure].all()


@pytest.mark.parametrize("length", [7, 32, 61])
@torch.no_grad()
def test_text(language_model, stored, length):
    check_logits(
        language_model(torch.from_numpy(stored[f"text.{length}.ids"])[None]).logits[0], stored, f"text.{length}"
    )


@pytest.mark.parametrize("length", [1023, 1024, 1025, 1100, 2048, 2049])
@torch.no_grad()
def test_dynamic_ntk_and_log_n_around_the_training_length(language_model, stored, length):
    ids = torch.from_numpy(stored["long.ids"][:length])[None]
    check_logits(language_model(ids).logits[0, stored[f"long.{length}.pos"]], stored, f"long.{length}")


@torch.no_grad()
def test_neither_in_train_mode(language_model, stored):
    ids = torch.from_numpy(stored["long.ids"][: int(stored["longtrain.n"])])[None]
    try:
        check_logits(language_model.train()(ids).logits[0, stored["longtrain.pos"]], stored, "longtrain")
    finally:
        language_model.eval()


@torch.no_grad()
def test_decoding_across_the_training_length(language_model, stored):
    logits = []
    output = language_model(torch.from_numpy(stored["cross.prompt"])[None], use_cache=True)
    for token in stored["cross.ids"]:
        logits.append(output.logits[0, -1])
        output = language_model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    check_logits(torch.stack(logits), stored, "cross")


@torch.no_grad()
def test_rows_of_different_length_each_get_their_own_base(language_model, stored):
    """Padding on the right, as in validation: a row's positions depend on its own length."""
    ids = torch.from_numpy(stored["long.ids"])[None]
    batch = ids.repeat(2, 1)
    mask = torch.ones_like(batch)
    mask[1, 1100:] = 0
    logits = language_model(batch, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1], language_model(ids).logits, **TOLERANCE)
    check_logits(logits[1, stored["long.1100.pos"]], stored, "long.1100")


def images(stored) -> torch.Tensor:
    return torch.from_numpy(stored["pixels_k64"]).float() / 64


def expand(ids: list[int], image_id: int, num_image_tokens: int) -> list[int]:
    return [copy for token in ids for copy in [token] * (num_image_tokens if token == image_id else 1)]


def training_batch(model, stored) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two stored examples, the placeholder N times, right-padded."""
    image_id, eos = int(stored["mm.image_token_id"]), int(stored["mm.eos_id"])
    assert model.processor.chat.image_token_id == image_id
    length = stored["mm.labels"].shape[1]
    rows = []
    for number in range(2):
        prompt = stored[f"mm.example{number}.prompt_ids"].tolist()
        rows.append(expand([*prompt, *stored[f"mm.example{number}.answer_ids"].tolist(), eos], image_id, 728))
    input_ids = torch.tensor([row + [eos] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return input_ids, torch.from_numpy(stored["mm.labels"]), mask


def test_the_report_checkpoint_in_training(model, stored):
    input_ids, labels, mask = training_batch(model, stored)
    model.zero_grad()
    output = model(images(stored), input_ids, labels)
    check_logits(output.logits, stored, "mm")
    torch.testing.assert_close(output.loss, torch.tensor(stored["mm.loss"], dtype=torch.float32), **TOLERANCE)
    supervised = model.loss(as_packed(images(stored), input_ids, labels, mask))
    torch.testing.assert_close(supervised, output.loss, rtol=1e-5, atol=0)
    with torch.no_grad(), model.LLM.disable_adapter():
        without = model(images(stored), input_ids, labels).loss
    torch.testing.assert_close(without, torch.tensor(stored["mm.loss_without_lora"], dtype=torch.float32), **TOLERANCE)

    supervised.backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name.removeprefix("grad/") for name in stored.files if name.startswith("grad/")]
    assert len(names) == 16
    for name in names:
        expected = torch.from_numpy(stored[f"grad/{name}"])
        actual = fused_gradient(name, gradients)
        assert (actual - expected).norm() < 2e-4 * expected.norm(), name


def fused_gradient(name: str, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of a matrix of the original: one A that three of ours began with, or three B stacked."""
    if name.startswith("feature_proj"):
        return gradients[name]
    layer, matrix = name.split(".")[4], name.split(".")[-2]
    ours = f"LLM.base_model.model.model.layers.{layer}"
    if "w1" in name or "w2" in name:
        linear = "up_proj" if "w1" in name else "gate_proj"
        return gradients[f"{ours}.mlp.{linear}.{matrix}.weight"]
    parts = [gradients[f"{ours}.self_attn.{part}_proj.{matrix}.weight"] for part in "qkv"]
    return sum(parts) if matrix == "lora_A" else torch.cat(parts)


@torch.no_grad()
def test_image_features(model, stored):
    features = model.project(model.encode_image(images(stored)))
    torch.testing.assert_close(features[:, ::7], torch.from_numpy(stored["mm.image_features"]), **TOLERANCE)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["greedy", "penalty1.1", "stopped"])
def test_generated_tokens(model, stored, number, kind):
    """`generate` and the answering engine alike. Random weights like the spare rows of the vocabulary too, which the
    original does not exclude: so nothing is suppressed here."""
    name = f"gen.{number}"
    ids = expand(stored[f"{name}.prompt_ids"].tolist(), model.processor.chat.image_token_id, 728)
    expected = stored[f"{name}.{kind}.ids"].tolist()
    stop = [int(stored[f"{name}.stop_id"])] if kind == "stopped" else None
    penalty = 1.1 if kind == "penalty1.1" else 1.0
    image = images(stored)[int(stored[f"{name}.image"])][None]
    settings = {"suppress_tokens": None, "eos_token_id": stop, "repetition_penalty": penalty}
    tokens = model.generate(image, torch.tensor([ids]), max_new_tokens=16, do_sample=False, **settings)
    assert tokens[0].tolist() == expected


@pytest.fixture(scope="module")
def real_vocabulary(tmp_path_factory):
    """The end-to-end model: tiny, with the real vocabulary."""
    folder = tmp_path_factory.mktemp("e2e")
    return write_checkpoints(folder, ORACLE / "e2e" / "args.json", "--tiktoken", str(ORACLE / "qwen.tiktoken"))


def test_answers_end_to_end(real_vocabulary):
    expected = json.loads((ORACLE / "e2e" / "expected.json").read_text(encoding="utf-8"))
    model = from_report(real_vocabulary)
    assert model.processor.chat.image_token_id == expected["image_token_id"]
    image = load_image(ORACLE / "e2e" / expected["image"])
    pixels = model.processor.transform(image)
    assert float(pixels.double().sum()) == pytest.approx(expected["pixel_values_sum"], abs=1.0)
    assert model.config.generate.repetition_penalty == 1.1
    for answer in expected["answers"]:
        question = model.processor.chat.question(answer["prompt"], 1)
        ids, _ = model.processor.chat.render([question])
        assert ids == expand(answer["ids"], model.processor.chat.image_token_id, 728)
        for kind, penalty in (("greedy", 1.0), ("penalty1.1", 1.1)):
            settings = model.config.generate.model_copy(
                update={"repetition_penalty": penalty, "max_new_tokens": len(answer[kind]["ids"])}
            )
            text = Answerer(model).stream_messages([image], [question], settings).rest().text
            assert text == answer[kind]["text"]


def test_every_string_of_the_tokenizer(real_vocabulary):
    expected = json.loads((ORACLE / "tokenizer_expected.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(real_vocabulary / "qwen")
    assert len(tokenizer) == expected["n_vocab"]
    for token, number in expected["special"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    for string in expected["strings"]:
        assert tokenizer.encode(string["text"], add_special_tokens=False) == string["ids"]
        plain = tokenizer.encode(string["text"], add_special_tokens=False, split_special_tokens=True)
        assert plain == string["ids_plain"]
    for decoded in expected["decode"]:
        assert tokenizer.decode(decoded["ids"]) == decoded["text"]
        assert tokenizer.decode(decoded["ids"], skip_special_tokens=True) == decoded["text_skip_special"]


def test_every_context_of_the_chat_format(real_vocabulary):
    expected = json.loads((ORACLE / "tokenizer_expected.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(real_vocabulary / "qwen")
    for context in expected["context"]:
        chat = ChatFormat(tokenizer, Prompt(system=context["system"]), 1, "qwen")
        messages = []
        for question, answer in context["history"] or []:
            messages += [chat.typed_question(question, 0), Message("assistant", (answer,))]
        ids, _ = chat.render([*messages, chat.typed_question(context["query"], 0)])
        assert ids == context["context_tokens"]


def test_training_goes_on_from_it_and_is_saved_in_our_layout(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-36000", tmp_path / "report")
    model = from_report(folder)
    assert model.config.llm.lora.r == 8
    assert model.config.llm.lora.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 5 * 2 + 4
