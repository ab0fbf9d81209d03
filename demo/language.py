"""Pretraining of the demo's Qwen2 language model, on the drawn world alone. Run by `python -m demo.pretrain language`.

It learns to answer about a scene that stands in the prompt, in two forms:
  * soft scenes: in the photo's place stand vectors, one per patch, as a projector will put there later. The patch at an
    object's centre gets the sum of the vectors of its colour, shape, size and cell, every other patch the vector of
    "none", all scaled and with noise. To save time most batches show only some patches, at their true positions.
  * text scenes: sentences that list the objects, in English or Chinese.
Prompts come from `qwen/chat.py`, the same as in training; many questions share one scene, as in `dataset/packing.py`.
"""

import copy
import time
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from config import IMAGE_TAG, Prompt
from demo.optimizers import make_optimizers, set_rate, take_step
from demo.world import (
    CAPTION_QUESTIONS,
    CELLS,
    CHINESE,
    COLOURS,
    GRID,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    captions,
    questions,
    random_scene,
)
from qwen.chat import IGNORE_INDEX, ChatFormat, Message
from qwen.tokenizer import image_token_id

IMAGE_TOKENS = GRID * GRID - 1  # the first patch is dropped, as in the full model
NOISE = 0.15  # of the soft scenes, as a share of the vectors
SPARE_ROWS = 85  # embedding rows above the vocabulary: room for `<|extra_0|>` and for users' own tokens
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant.", "", "Answer the question.")
VALUES = (*COLOURS, *SHAPES, *SIZES, *CELLS)
OTHER_KINDS = {"sentences": 0.6, "caption first": 0.2, "text": 0.2}  # one joins the questions in each step: share
QUESTION_STEPS = 500  # steps on questions alone at the start


class SceneReader(nn.Module):
    """Qwen2 and the vectors of soft scenes (thrown away after pretraining: the projector takes their place)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
        self.language = Qwen2ForCausalLM(config)
        self.language.set_attn_implementation("demo_branches")
        self.value_vectors = nn.Embedding(len(VALUES), config.hidden_size)
        self.none_vector = nn.Parameter(torch.randn(config.hidden_size) * 0.06)
        nn.init.normal_(self.value_vectors.weight, std=0.06)

    def soft_patches(self, values: Tensor, noise: float) -> Tensor:
        """values (B, K, 4), indices into VALUES or -1 for a patch without object -> (B, K, D)."""
        has_object = values[..., :1] >= 0
        objects = self.value_vectors(values.clamp_min(0)).sum(2)  # (B, K, D)
        patches = torch.where(has_object, objects, self.none_vector)
        scale = 1 + noise * (torch.rand(*patches.shape[:2], 1) * 1.2 - 0.6)
        spread = noise * patches.detach().square().mean().sqrt()
        return scale * patches + spread * torch.randn_like(patches)

    def forward(self, batch: dict[str, Tensor], noise: float) -> tuple[Tensor, Tensor]:
        """Logits (S, V) at the supervised positions and the tokens they should name (S,)."""
        embedded = self.language.get_input_embeddings()(batch["input_ids"])  # (B, T, D)
        if "values" in batch:
            rows, columns = batch["patch_mask"].nonzero(as_tuple=True)
            patches = self.soft_patches(batch["values"], noise)
            embedded = embedded.index_put((rows, columns), patches.flatten(0, 1).to(embedded.dtype))
        hidden = self.language.model(
            inputs_embeds=embedded,
            attention_mask=batch["visible"],
            position_ids=batch["position_ids"],
            branch_length=batch["branch_length"],
            use_cache=False,
        ).last_hidden_state  # (B, T, D)
        labels = batch["labels"][:, 1:]
        asked = labels != IGNORE_INDEX
        return self.language.lm_head(hidden[:, :-1][asked]), labels[asked]


def branch_attention(module, query, key, value, attention_mask, scaling, branch_length, **_) -> tuple[Tensor, None]:
    """Attention over [prefix][branch 1][branch 2]…: each branch sees the prefix and itself, nothing else is computed.

    Dense attention with a mask over the whole row takes eight times the work at these lengths.

    Args:
        query: (B, H, T, d); key and value have fewer heads; T = P + Q * L with the prefix P and Q branches of length L.
        attention_mask: (B, 1, Q * L, P + L) bool, the prefix and own-branch tokens each branch token sees.
        branch_length: L.
    """
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    prefix = attention_mask.shape[-1] - branch_length
    own_query, own_key, own_value = (
        part[:, :, prefix:].unflatten(2, (-1, branch_length)) for part in (query, key, value)
    )  # (B, H, Q, L, d)
    to_prefix = query[:, :, prefix:] @ key[:, :, :prefix].transpose(-1, -2)  # (B, H, Q * L, P)
    to_own = (own_query @ own_key.transpose(-1, -2)).flatten(2, 3)  # (B, H, Q * L, L)
    scores = (torch.cat([to_prefix, to_own], dim=-1) * scaling).masked_fill(~attention_mask, -1e4)
    weights = scores.float().softmax(-1).to(query.dtype)
    from_own = weights[..., prefix:].unflatten(2, (-1, branch_length)) @ own_value
    branches = weights[..., :prefix] @ value[:, :, :prefix] + from_own.flatten(2, 3)
    prefixes = scaled_dot_product_attention(*(part[:, :, :prefix] for part in (query, key, value)), is_causal=True)
    return torch.cat([prefixes, branches], dim=2).transpose(1, 2), None


AttentionInterface.register("demo_branches", branch_attention)


class SceneWriter:
    """Makes batches: scenes, their questions and the packed token rows."""

    def __init__(self, tokenizer, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image_token_id = image_token_id(tokenizer)
        self.formats = [ChatFormat(tokenizer, Prompt(system=system), crop_tokens=1) for system in SYSTEMS]
        self.render = lru_cache(maxsize=200_000)(self._render)

    def _render(self, format_index: int, shown: str | None, question: str, answer: str) -> tuple[list[int], list[int]]:
        chat = self.formats[format_index]
        asked = chat.question(question, 1) if shown is None else Message("user", (f"{shown}\n{question}",))
        return chat.render([asked, chat.answer(answer)])

    def batch(self, kind: str, size: int, patches: int) -> tuple[dict, list[list[str]]]:
        """`size` scenes shown by `patches` of their patches; also the question types of every row's branches."""
        prefixes, branches, types, values = [], [], [], []
        for _ in range(size):
            scene = random_scene(self.rng)
            asked = self._questions(scene, kind)
            chat = int(self.rng.integers(len(SYSTEMS)))
            shown = text_scene(scene, self.rng) if kind == "text" else None
            samples = [self.render(chat, shown, question, answer) for _, question, answer in asked]
            if kind == "text":
                columns = zip(*(ids for ids, _ in samples), strict=False)
                length = next(index for index, column in enumerate(columns) if len(set(column)) > 1)
                prefix = {"input_ids": samples[0][0][:length], "position_ids": list(range(length))}
                first_position = length
            else:
                photo = samples[0][0].index(self.image_token_id)
                length = photo + 1
                places, row_values = self._show(scene, patches)
                prefix = {
                    "input_ids": samples[0][0][:photo] + [self.image_token_id] * patches,
                    "position_ids": [*range(photo), *(photo + places).tolist()],
                }
                values.append(row_values)
                first_position = photo + IMAGE_TOKENS
            prefixes.append(prefix)
            branches.append([(ids[length:], labels[length:], first_position) for ids, labels in samples])
            types.append([name for name, _, _ in asked])
        batch = _lay_out(prefixes, branches)
        if values:
            batch["values"] = torch.from_numpy(np.stack(values))
            batch["patch_mask"] = batch["input_ids"] == self.image_token_id
        return batch, types

    def _questions(self, scene: Scene, kind: str) -> list[tuple[str, str, str]]:
        """(type, question, answer) of the branches. Short and long answers are kept apart, to pad little."""
        caption = captions(scene)[int(self.rng.integers(5))]
        chinese = CAPTION_QUESTIONS[int(self.rng.integers(2))]
        if kind == "caption first":  # the photo comes after the question
            return [("caption", chinese + IMAGE_TAG, caption)]
        tag = "" if kind == "text" else f"{IMAGE_TAG}\n"
        asked = [(name, tag + question, answer) for name, question, answer in questions(scene, self.rng, 4)]
        if kind == "sentences":
            long = [row for row in asked if row[0] == "description"]
            return [*long, ("caption", (IMAGE_TAG if self.rng.random() < 0.5 else tag) + chinese, caption)]
        return [row for row in asked if row[0] != "description"]

    def _show(self, scene: Scene, patches: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted places (patches,) in 0..727 of the patches shown, and their values (patches, 4), -1 without object."""
        centres = {thing.row * GRID + thing.column - 1: thing for thing in scene}
        others = np.setdiff1d(np.arange(IMAGE_TOKENS), list(centres))
        chosen = self.rng.choice(others, size=patches - len(centres), replace=False)
        places = np.sort([*centres, *chosen])
        values = np.full((patches, 4), -1)
        for index, place in enumerate(places.tolist()):
            if place in centres:
                thing = centres[place]
                values[index] = [VALUES.index(name) for name in (thing.colour, thing.shape, thing.size, thing.place)]
        return places, values


def _lay_out(prefixes: list[dict[str, list[int]]], branches: list[list[tuple[list[int], list[int], int]]]) -> dict:
    """Rows of [prefix][branch 1][branch 2]…, prefixes padded to the longest, branches to the longest, on the right."""
    size, width = len(prefixes), max(len(row["input_ids"]) for row in prefixes)
    number = max(len(row) for row in branches)
    length = max(len(ids) for row in branches for ids, _, _ in row)
    zeros = torch.zeros(size, width + number * length, dtype=torch.int64)
    columns = {"input_ids": zeros, "position_ids": zeros.clone(), "labels": torch.full_like(zeros, IGNORE_INDEX)}
    visible = torch.zeros(size, 1, number, length, width + length, dtype=torch.bool)
    visible[..., width:] = torch.ones(length, length, dtype=torch.bool).tril()
    for index, (prefix, row) in enumerate(zip(prefixes, branches, strict=True)):
        used = len(prefix["input_ids"])
        visible[index, ..., :used] = True
        for name, values in prefix.items():
            columns[name][index, :used] = torch.tensor(values)
        for branch, (ids, labels, first_position) in enumerate(row):
            start = width + branch * length
            columns["input_ids"][index, start : start + len(ids)] = torch.tensor(ids)
            columns["labels"][index, start : start + len(ids)] = torch.tensor(labels)
            columns["position_ids"][index, start : start + length] = torch.arange(length) + first_position
    return {**columns, "visible": visible.flatten(2, 3), "branch_length": length}


def text_scene(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in sentences, in any order, English or Chinese."""
    order = [scene[index] for index in rng.permutation(len(scene))]
    if rng.random() < 0.5:
        return "".join(f"{CHINESE[thing.place]}有{_chinese_size(thing)}{_chinese_name(thing)}。" for thing in order)
    return " ".join(f"There is a {thing.size} {thing.name} in the {thing.place}." for thing in order)


def _chinese_size(thing: Thing) -> str:
    return "大的" if thing.size == "large" else "小的"


def _chinese_name(thing: Thing) -> str:
    return CHINESE[thing.colour] + CHINESE[thing.shape]


@torch.inference_mode()
def score(reader: SceneReader, tokenizer, seed: int, scenes: int, patches: int, kind: str) -> dict[str, float]:
    """Share of questions per type answered exactly right.

    An answer counts if every token of it is the likeliest one given the right ones before it; greedy decoding then
    writes exactly this answer. Of a caption only the template is given, since all five are right.
    """
    writer = SceneWriter(tokenizer, np.random.default_rng(seed))
    right, total = defaultdict(int), defaultdict(int)
    for _ in range(scenes // 16):
        batch, types = writer.batch(kind, 16, patches)
        logits, targets = reader(batch, noise=NOISE)
        asked = batch["labels"] != IGNORE_INDEX
        hit = asked.clone()
        hit[asked] = logits.argmax(-1) == targets
        prefix = batch["visible"].shape[-1] - batch["branch_length"]
        hit, asked = (part[:, prefix:].unflatten(1, (-1, batch["branch_length"])) for part in (hit, asked))  # (B, Q, L)
        for row, row_types in enumerate(types):
            for branch, name in enumerate(row_types):
                hits = hit[row, branch][asked[row, branch]]
                right[name] += bool(hits[1 if name == "caption" else 0 :].all())
                total[name] += 1
    scores = {name: round(right[name] / total[name], 4) for name in total}
    return scores | {"all": round(sum(right.values()) / sum(total.values()), 4)}


def pretrain(tokenizer, folder: Path, steps: int, seed: int, log) -> dict[str, dict[str, float]]:
    """Train for `steps` steps and write the model to `folder`; returns its scores on fresh scenes.

    Every step holds questions. A step on captions or sentences alone would move the weights just as far (Muon's steps
    all have one size) and undo what the questions taught: with such steps between, most types stayed at chance.
    Every 500 steps the unfinished model is written too, so an interrupted run leaves something to work with.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    writer = SceneWriter(tokenizer, rng)
    reader = SceneReader(len(tokenizer) + SPARE_ROWS)
    optimizers = make_optimizers(reader, reader.language.model.layers, peak=4e-3)
    running = dict.fromkeys(("questions", *OTHER_KINDS), 5.0)  # smoothed losses, for the log
    for step in range(1, steps + 1):
        set_rate(optimizers, min(1.0, step / 100) * min(1.0, 2.5 * (1 - step / steps)))
        sizes = {"questions": 8}  # scenes by kind
        if step > QUESTION_STEPS:
            sizes = {"questions": 6, str(rng.choice(list(OTHER_KINDS), p=list(OTHER_KINDS.values()))): 6}
        whole = step > 0.8 * steps and step % 2 == 0
        losses = []
        for kind, size in sizes.items():
            patches = IMAGE_TOKENS if whole else int(rng.integers(8, 25))
            batch, _ = writer.batch(kind, 2 if whole else size, patches)
            with torch.autocast("cpu", torch.bfloat16):
                logits, targets = reader(batch, NOISE)
            losses.append(cross_entropy(logits.float(), targets))
            running[kind] = 0.95 * running[kind] + 0.05 * losses[-1].item()
        torch.stack(losses).sum().backward()
        take_step(optimizers, reader)
        if step % 100 == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in running.items())
            log(f"language step {step}, processor time {time.process_time():.0f} s, loss {shown}")
        if step % 500 == 0:
            log(str({name: score(reader, tokenizer, seed + 1, 48, 32, name) for name in ("questions", "sentences")}))
            _store(reader.language, tokenizer, folder)
    reader.to(torch.bfloat16).float()  # the weights as they are stored
    _store(reader.language, tokenizer, folder)
    return {
        f"{name}, {patches} patches": score(reader, tokenizer, seed + 1, 160, patches, name)
        for name, patches in (("questions", IMAGE_TOKENS), ("sentences", IMAGE_TOKENS), ("caption first", IMAGE_TOKENS))
    } | {"text": score(reader, tokenizer, seed + 1, 160, 32, "text")}


def _store(model: Qwen2ForCausalLM, tokenizer, folder: Path) -> None:
    """Write `model` in bf16, with the end and padding tokens that Qwen's own folders name."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.set_attn_implementation("sdpa")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    stored.config.eos_token_id, stored.config.bos_token_id = ends[0], ends[1]
    stored.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], bos_token_id=ends[1], do_sample=False
    )
    stored.save_pretrained(folder)
