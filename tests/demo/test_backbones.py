"""The shipped backbones: layout, true geometry, size, and the skills that their scores claim."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, SiglipVisionModel

from demo.encoder import pixel_values
from demo.pretrain import BACKBONES
from demo.words import CHAT_TEMPLATE, train_tokenizer
from demo.world import CELLS, COLOURS, GRID, draw, random_scene
from qwen.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BACKBONES / "qwen")


@pytest.fixture(scope="module")
def language():
    return AutoModelForCausalLM.from_pretrained(BACKBONES / "qwen", dtype=torch.float32)


def test_encoder_has_the_true_geometry():
    encoder = SiglipVisionModel.from_pretrained(BACKBONES / "siglip", dtype=torch.float32)
    pictures = np.stack([np.asarray(draw(random_scene(np.random.default_rng(1)), np.random.default_rng(2)))])
    with torch.inference_mode():
        features = encoder(pixel_values=pixel_values(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    assert features.last_hidden_state.shape == (1, 729, 64)


def test_encoder_features_tell_the_cell_linearly():
    """A least-squares fit on a few pictures reads the cell of objects in others: the weights are trained ones."""
    encoder = SiglipVisionModel.from_pretrained(BACKBONES / "siglip", dtype=torch.float32)
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(48)]
    pictures = torch.from_numpy(np.stack([np.asarray(draw(scene, rng)) for scene in scenes])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = encoder(pixel_values=pixel_values(pictures)).last_hidden_state
    things = [(index, thing) for index, scene in enumerate(scenes) for thing in scene]
    centres = torch.stack([features[index, thing.row * GRID + thing.column] for index, thing in things])  # (M, 64)
    cells = torch.tensor([thing.cell for _, thing in things])
    half = len(things) // 2
    wanted = torch.nn.functional.one_hot(cells[:half], len(CELLS)).float()
    fit = torch.linalg.lstsq(centres[:half], wanted, driver="gelsd").solution
    assert ((centres[half:] @ fit).argmax(1) == cells[half:]).float().mean() > 0.9


def test_tokenizer_gives_any_text_back(tokenizer):
    for text in ("ñandú 😀 日本語 \t\n\n  x", "<|im_end|> typed", "图中有左上的红色圆形、右边的三角形。", "12345 €"):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer) - 4  # no control token


def test_tokenizer_is_the_one_the_code_trains(tokenizer):
    assert (
        json.loads(train_tokenizer().backend_tokenizer.to_str())["model"]
        == json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    )


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_spare_rows_and_size(tokenizer, language):
    assert language.get_input_embeddings().weight.shape[0] >= len(tokenizer) + 64
    assert sum(file.stat().st_size for file in BACKBONES.rglob("*.safetensors")) <= 12e6


def test_language_model_writes_world_answers(tokenizer, language):
    """Greedy, free-running, through transformers' own generate: told about one object, it answers in the right form."""
    question = "There is a large red circle in the north.\n{}"
    for asked, words in {
        "What colour is the circle?": COLOURS,
        "Where is the circle?": CELLS,
        "How many circles are there?": "012345",
        "Is there a red circle?": ("yes", "no"),
    }.items():
        messages = [{"role": "user", "content": question.format(asked)}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = language.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) in words


def test_both_backbones_are_good_at_their_own_task():
    """What the runs wrote down; the thresholds of the pretraining are what `make demo` needs to reach its own bar."""
    scores = {name: record["scores"] for name, record in json.loads((BACKBONES / "scores.json").read_text()).items()}
    assert set(scores) == {"encoder", "language", "checkpoint"}
    photos, wordings = scores["checkpoint"]["held-out photos"], scores["checkpoint"]["held-out wordings"]
    assert min(photos.values()) > 0.95
    assert scores["checkpoint"]["held-out photos, with another photo"]["all but unknown"] < 0.3
    assert min(wordings.values()) >= 0.8
    assert min(scores["encoder"]["pictures"][name] for name in ("colour", "shape", "size", "cell")) > 0.95
    assert scores["encoder"]["parts"]["all"] > 0.9
    for name, by_type in scores["language"].items():
        if name == "text":  # told in words: weak
            continue
        # a dialogue seldom asks for an English description: 16 in all
        weaker = {"dialogues": {"description": 0.8}}.get(name.partition(",")[0], {})
        # with a part behind the scene, other questions are side tasks, of 50 questions a type
        limit = {"paraphrases": 0.8, "regions": 0.85}.get(name.partition(",")[0], 0.9)
        assert all(value > weaker.get(kind, limit) for kind, value in by_type.items()), name
    boxed = {kind: value for kind, value in scores["language"]["regions, 728 patches"].items() if "region" in kind}
    assert len(boxed) == 6
    assert min(boxed.values()) > 0.95
