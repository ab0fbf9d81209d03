"""Pretraining of the demo's Qwen2 language model on the drawn world only. Run by `python -m demo.pretrain language`.

It learns to answer questions about a scene in the prompt. A scene has one of two forms:
  * soft scenes: one vector per patch at the position of the photo, as the projector's rows later. The patch at an
    object's centre gets the sum of the vectors of its colour, shape, size and cell. Every other patch gets the vector
    of "none". All are scaled and have noise. To save time, most batches contain only some patches, at their true
    positions.
  * text scenes: sentences that list the objects, in English or Chinese.
A question about a boxed object ("regions") has a second soft scene: the object alone, enlarged.
Prompts, packing, attention and loss are those of training: a row is a `batch.Batch` of concatenated scenes, each with
all of its questions. A branch is a question with its answer, or a dialogue with all of its answers.

Shapes: B scenes, K patches shown of each, T tokens of the row, D width.
"""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from batch import Batch, sample_positions
from config import IMAGE_TAG, Prompt
from dataset.image_caption_dataset import Sample, collate, pack
from demo.asking import Row, dialogue, paraphrases, questions
from demo.edits import vary
from demo.optimizers import make_optimizers, set_rate, take_step
from demo.regions import in_its_part, object_box, region_questions
from demo.wordings import SUFFIX
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
    random_scene,
)
from model.precision import cpu_has_bf16
from qwen.attention import ATTENTION, register_attention
from qwen.chat import IGNORE_INDEX, ChatFormat
from qwen.Mqwen import MQwen2ForCausalLM
from qwen.tokenizer import image_token_id
from visual_plan import VisualPlan

IMAGE_TOKENS = GRID * GRID - 1  # the first patch is dropped, as in the full model
NOISE = 0.15  # of the soft scenes, as a share of the vectors
SPARE_ROWS = 85  # embedding rows above the vocabulary, for `<|extra_0|>` and for users' own tokens
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant.", "", "Answer the question.")
VALUES = (*COLOURS, *SHAPES, *SIZES, *CELLS)
# probability of the second kind in a step
OTHER_KINDS = {"dialogues": 0.47, "sentences": 0.24, "regions": 0.16, "caption first": 0.08, "text": 0.05}
# Last steps of the first phases: English questions in one wording, both languages in one wording, questions only.
# With both languages and all wordings from the start, 0.66 of the answers were right after 1,000 steps.
ENGLISH_STEPS, PLAIN_STEPS, QUESTION_STEPS = 500, 700, 1700
DIALOGUES = 4  # branches of a scene
NAMED = 4  # questions of a scene with a boxed object that name what they ask about; the others are about "it"
BOXED = f"{IMAGE_TAG}{IMAGE_TAG}\n"  # the photo and the part in the box


class SceneReader(nn.Module):
    """Qwen2 and the vectors of soft scenes (discarded after pretraining; the projector replaces them)."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        config = Qwen2Config(
            vocab_size=len(tokenizer) + SPARE_ROWS,
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
        register_attention()
        self.language = MQwen2ForCausalLM(config)
        self.language.set_attn_implementation(ATTENTION)
        self.language.image_token_id = image_token_id(tokenizer)
        self.value_vectors = nn.Embedding(len(VALUES), config.hidden_size)
        self.none_vector = nn.Parameter(torch.randn(config.hidden_size) * 0.06)
        nn.init.normal_(self.value_vectors.weight, std=0.06)

    def soft_patches(self, values: Tensor, noise: float) -> Tensor:
        """Map values (B, K, 4), indices into VALUES or -1 for a patch without object, to patches (B, K, D)."""
        has_object = values[..., :1] >= 0
        objects = self.value_vectors(values.clamp_min(0)).sum(2)  # (B, K, D)
        patches = torch.where(has_object, objects, self.none_vector)
        scale = 1 + noise * (torch.rand(*patches.shape[:2], 1) * 1.2 - 0.6)
        spread = noise * patches.detach().square().mean().sqrt()
        return scale * patches + spread * torch.randn_like(patches)

    def embed(self, batch: Batch, noise: float) -> Tensor:
        """Embeddings (1, T, D), with patch vectors at the placeholders."""
        values = batch.image_features  # (B, K, 4); None: text scenes
        patches = None if values is None else self.soft_patches(values, noise)
        return self.language.embed(batch.input_ids, patches)

    def loss(self, batch: Batch, noise: float) -> Tensor:
        """Mean loss over the supervised tokens of the row."""
        return self.language.packed_loss(self.embed(batch, noise), batch.labels, batch.position_ids, batch.lengths)

    def hits(self, batch: Batch, noise: float) -> Tensor:
        """Mask (T,) bool of the supervised tokens that the model predicts correctly from the tokens before them."""
        asked = batch.labels != IGNORE_INDEX  # (1, T)
        predicts = pad(asked[:, 1:], (0, 1))
        hidden = self.language.packed_states(self.embed(batch, noise), batch.position_ids, batch.lengths, predicts)
        hits = asked.clone()
        hits[asked] = self.language.lm_head(hidden).argmax(-1) == batch.labels[asked]
        return hits[0]


class SceneWriter:
    """Generator of batches: scenes, their questions and the packed token rows."""

    def __init__(self, tokenizer, rng: np.random.Generator) -> None:
        self.rng = rng
        self.formats = [ChatFormat(tokenizer, Prompt(system=system), IMAGE_TOKENS) for system in SYSTEMS]

    def batch(self, kind: str, size: int, patches: int) -> tuple[Batch, list[list[list[str]]]]:
        """Make a batch of `size` scenes with `patches` patches each; also return the types of the answers.

        `image_features` are the values of these patches, (B, K, 4), as in `SceneReader.soft_patches`. The types are
        those of each answer of each branch of each scene.
        """
        scenes = [self._scene(number, kind, patches) for number in range(size)]
        samples, positions, types = zip(*scenes, strict=True)
        batch = collate(samples)
        assert isinstance(batch, Batch), "no photo is read here, so none is broken"
        batch.position_ids = torch.cat(positions)[None]
        return batch, list(types)

    def _scene(self, number: int, kind: str, patches: int) -> tuple[Sample, Tensor, list[list[str]]]:
        """Make one scene with its branches, the positions of its tokens, and the types of the answers."""
        scene = random_scene(self.rng)
        photos, branches = [scene], self._branches(scene, kind)
        if kind == "regions":
            boxed = scene[int(self.rng.integers(len(scene)))]
            photos.append((in_its_part(boxed, object_box(boxed, self.rng)),))
            branches += [[row] for row in self._about(boxed)]
        chat = self.formats[int(self.rng.integers(len(SYSTEMS)))]
        shown = f"{text_scene(scene, self.rng)}\n" if kind == "text" else ""
        rendered = [self._render(branch, chat, shown, patches) for branch in branches]
        input_ids, labels, lengths = pack(rendered)
        sample = Sample(torch.tensor(input_ids), torch.tensor(labels), lengths, (), {})
        positions = sample_positions(lengths)
        start = 0 if shown else input_ids.index(chat.image_token_id)
        features = {}
        for index, photo in enumerate([] if shown else photos):
            places, values = self._show(photo, patches)
            # the values take the place of a photo's cached features; `SceneReader` projects them
            features[number * len(photos) + index] = torch.from_numpy(values)[None]
            # positions count all patches, also the omitted ones
            positions[start : start + patches] = positions[start] + torch.from_numpy(places)
            start += patches
            positions[start:] += IMAGE_TOKENS - patches
        sample.photo_ids, sample.photos = tuple(features), features
        return sample, positions, [[name for name, _, _ in branch] for branch in branches]

    def _render(self, branch: list[Row], chat: ChatFormat, shown: str, patches: int) -> tuple[list[int], list[int]]:
        """Render a dialogue as the product does; its first question has the photo, or the words `shown`."""
        messages = []
        for _, question, answer in branch:
            photos = [VisualPlan(patches)] * question.count(IMAGE_TAG)
            messages += [chat.question(question if messages else shown + question, photos), chat.answer(answer)]
        return chat.render(messages)

    def _branches(self, scene: Scene, kind: str) -> list[list[Row]]:
        """Return the rows (type, question, answer) of each branch.

        Branches of one question have only short or only long answers in a scene, because a loss is a mean over tokens.
        """
        caption = captions(scene)[int(self.rng.integers(5))]
        chinese = CAPTION_QUESTIONS[int(self.rng.integers(2))]
        if kind == "caption first":  # the photo comes after the question
            return [[("caption", chinese + IMAGE_TAG, caption)]]
        if kind == "dialogues":
            branches = [dialogue(scene, self.rng) for _ in range(DIALOGUES)]
        elif kind == "paraphrases":  # held out: only scored
            branches = [[row] for row in paraphrases(scene, self.rng, int(self.rng.integers(10)))]
        else:
            long = ("description", "unknown")
            english = kind == "plain english"
            asked = questions(scene, self.rng, 4 if english else 2, plain=kind.startswith("plain"), sizes=4)
            asked = [row for row in asked if not (english and row[0].endswith(SUFFIX["chinese"]))]
            branches = [[row] for row in asked if row[0].startswith(long) == (kind == "sentences")]
            if kind == "regions":  # some that name what they ask about, so that not all are about the second photo
                branches = [branches[index] for index in self.rng.permutation(len(branches))[:NAMED]]
        tag = {"text": "", "regions": BOXED}.get(kind, f"{IMAGE_TAG}\n")
        branches = [[(name, tag + question, answer), *others] for (name, question, answer), *others in branches]
        if kind == "sentences":
            branches.append([("caption", (IMAGE_TAG if self.rng.random() < 0.5 else tag) + chinese, caption)])
        return branches

    def _about(self, boxed: Thing) -> list[Row]:
        """Return questions about "it", as people type them, behind the photo and the part."""
        rows = []
        for name, question, answer in region_questions(boxed, self.rng):
            language = "chinese" if name.endswith(SUFFIX["chinese"]) else "english"
            rows.append((name, BOXED + vary(question, self.rng, language), answer))
        return rows

    def _show(self, scene: Scene, patches: int) -> tuple[np.ndarray, np.ndarray]:
        """Choose patches: sorted places (patches,) in 0..727 and values (patches, 4), -1 without object."""
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


def text_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Describe the scene in sentences, in random order, in English or Chinese."""
    order = [scene[index] for index in rng.permutation(len(scene))]
    if rng.random() < 0.5:
        return "".join(f"{CHINESE[thing.place]}有{CHINESE[thing.size]}{_chinese_name(thing)}。" for thing in order)
    return " ".join(f"There is a {thing.size} {thing.name} in the {thing.place}." for thing in order)


def _chinese_name(thing: Thing) -> str:
    return CHINESE[thing.colour] + CHINESE[thing.shape]


@torch.inference_mode()
def score(reader: SceneReader, tokenizer, seed: int, scenes: int, patches: int, kind: str) -> dict[str, float]:
    """Share of questions per type with an exactly correct answer.

    An answer is correct if each of its tokens is the most likely one after the correct tokens before it; greedy
    decoding then produces exactly this answer. The first token of a caption, which selects one of five correct
    templates, does not count. Later answers of a dialogue count apart, as "follow-up"; its questions see the correct
    earlier answers, as in `eval_vqa.py`.
    """
    writer = SceneWriter(tokenizer, np.random.default_rng(seed))
    right, total = defaultdict(int), defaultdict(int)
    for _ in range(scenes // 16):
        batch, types = writer.batch(kind, 16, patches)
        parts = [length for lengths in batch.lengths for length in lengths]
        branches = [names for row_types in types for names in ([], *row_types)]  # []: the prefix
        hits, asked = reader.hits(batch, NOISE).split(parts), (batch.labels[0] != IGNORE_INDEX).split(parts)
        for names, part_hits, part_asked in zip(branches, hits, asked, strict=True):
            for turn, (name, own) in enumerate(zip(names, _runs(part_asked), strict=True)):
                name = "follow-up" if turn else name
                right[name] += bool(part_hits[own][1 if name == "caption" else 0 :].all())
                total[name] += 1
    scores = {name: round(right[name] / total[name], 4) for name in sorted(total)}
    return scores | {"all": round(sum(right.values()) / sum(total.values()), 4)}


def _runs(mask: Tensor) -> list[Tensor]:
    """Return the indices of each run of True in `mask` (T,): the supervised tokens of each answer."""
    places = mask.nonzero()[:, 0]
    ends = (places.diff() > 1).nonzero()[:, 0] + 1
    return list(places.tensor_split(ends.cpu())) if len(places) else []


def pretrain(tokenizer, folder: Path, steps: int, seed: int, log) -> dict[str, dict[str, float]]:
    """Train for `steps` steps and write the model to `folder`; return its scores on new scenes.

    The first steps ask in English and in one wording of each kind. The model then learns what to look at in a third of
    the time, and the other language and wordings afterwards. Every step contains questions. A step on captions or
    sentences only would change the weights as much, because Muon's steps all have the same size, and undo the effect of
    the questions: with such steps, most types stayed at chance.
    After the first steps, questions about sizes are twice as many as those of another type, because they are learned
    last; dialogues ask for all types equally often.
    The unfinished model is also written every 500 steps, so an interrupted run leaves a usable file.

    Two processes share the scenes of each step and take the same steps, by the mean of their gradients; the first one
    scores and writes. Each has scenes of its own, so the weights differ from those of one process.
    """
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)  # of the kinds of scenes: the same in all processes
    writer = SceneWriter(tokenizer, np.random.default_rng([seed, 1 + rank]))
    reader = SceneReader(tokenizer)
    torch.manual_seed(seed + rank)  # of the noise
    optimizers = make_optimizers(reader, reader.language.model.layers, peak=4e-3)
    running = dict.fromkeys(("plain english", "plain", "questions", *OTHER_KINDS), 5.0)  # smoothed losses, for the log
    for step in range(1, steps + 1):
        set_rate(optimizers, min(1.0, step / 100) * min(1.0, 2.5 * (1 - step / steps)))
        sizes = {_first_kind(step): 8}  # scenes by kind
        if step > QUESTION_STEPS:
            sizes = {"questions": 6, str(rng.choice(list(OTHER_KINDS), p=list(OTHER_KINDS.values()))): 6}
        whole = step > 0.8 * steps and step % 2 == 0
        losses = []
        for kind, size in sizes.items():
            patches = IMAGE_TOKENS if whole else int(rng.integers(8, 25))
            batch, _ = writer.batch(kind, (2 if whole else size) // processes, patches)
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                losses.append(reader.loss(batch, NOISE))
            running[kind] = 0.95 * running[kind] + 0.05 * losses[-1].item()
        torch.stack(losses).sum().backward()
        take_step(optimizers, reader)
        if step % 100 == 0 and rank == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in running.items())
            log(f"language step {step}, processor time {time.process_time():.0f} s, loss {shown}")
        if step % 500 == 0 and rank == 0:
            kinds = ("plain english", "plain", "questions", "dialogues", "sentences", "regions", "paraphrases")
            log(str({name: score(reader, tokenizer, seed + 1, 48, 32, name) for name in kinds}))
            _store(reader.language, tokenizer, folder)
    if rank:
        return {}
    reader.to(torch.bfloat16).float()  # the weights as they are stored
    _store(reader.language, tokenizer, folder)
    kinds = ("questions", "dialogues", "sentences", "caption first", "regions", "paraphrases")
    scores = {
        f"{name}, {IMAGE_TOKENS} patches": score(reader, tokenizer, seed + 1, 160, IMAGE_TOKENS, name) for name in kinds
    }
    return scores | {"text": score(reader, tokenizer, seed + 1, 160, 32, "text")}


def _first_kind(step: int) -> str:
    return "plain english" if step <= ENGLISH_STEPS else "plain" if step <= PLAIN_STEPS else "questions"


def _store(model: MQwen2ForCausalLM, tokenizer, folder: Path) -> None:
    """Write `model` in bf16, with the end and padding tokens of Qwen's own folders."""
    # use transformers' class, because its name goes into config.json; it copies `config`
    stored = Qwen2ForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16
    )
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    stored.config.eos_token_id, stored.config.bos_token_id = ends[0], ends[1]
    stored.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], bos_token_id=ends[1], do_sample=False
    )
    stored.save_pretrained(folder)
