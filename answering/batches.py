"""Answers to many prompts at once: prompts on the same photos share its keys, all prompts share each pass.

`Answerer.answer_many` fills a `PromptBatch` and calls `answer_batch`. The questions on one photo are branches behind
one prefix, as in training (`qwen/attention.py`), so nothing is padded but the attention of a pass
(`qwen/branches.py`).

Shapes: T tokens of the packed row, N questions that have not ended, Dl width, V vocabulary.
"""

import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager

import torch

from answering.choice import suppress
from answering.open_answer import OpenAnswer
from answering.request import OpenPrompt, Picture, Reply, common_length
from batch import sample_positions
from config import Generate
from model.model import MMultiModal
from qwen.branches import BranchCache

# Tokens whose keys and values are held at once, and their bytes: 22 photos of 728 tokens with one question each, or 100
# questions on 6 photos. Qwen-7B (v1) has no grouped heads: half a MiB a token in bf16, so 4096 tokens at once.
BATCH_TOKENS = 16384
BATCH_BYTES = 2 * 2**30
# Questions behind one prefix. A question's pass reads the keys of all of them, so more would cost more than reading
# the prefix again.
MOST_BRANCHES = 16


class PromptBatch:
    """Prompts that are answered together, grouped by all that comes before the end of their last photo.

    Attributes:
        slots: tokens that keys and values are held of.
        prompts: in the order in which they came.
        pixels: hash of a photo → (crops, 3, H, W).

    Args:
        most_tokens: that keys and values are held of.
        beams: of each answer.
    """

    def __init__(self, most_tokens: int, beams: int = 1) -> None:
        self.prompts: list[OpenPrompt] = []
        self.pixels: dict[str, torch.Tensor] = {}
        self.slots = 0
        self._most_tokens, self._beams = most_tokens, beams
        self._groups: dict[Hashable, list[int]] = {}  # numbers in `prompts`
        self._tokens: dict[Hashable, int] = {}  # of a group, if all answers are as long as they may be

    def add(self, model: MMultiModal, prompt: OpenPrompt, pictures: list[Picture]) -> bool:
        """Add a prompt; return False if there is no room for it. There always is for the first."""
        shared = prompt.photos_end
        key: Hashable = (prompt.photos, tuple(prompt.ids[:shared]))
        tokens = self._tokens.get(key, shared) + len(prompt.ids) - shared + self._beams * prompt.limit
        # each group gets as many slots as the largest
        slots = len(self._tokens | {key: tokens}) * max(tokens, *self._tokens.values(), 0)
        if self.prompts and slots > self._most_tokens:
            return False
        self.slots = slots
        self._groups.setdefault(key, []).append(len(self.prompts))
        self._tokens[key] = tokens
        self.prompts.append(prompt)
        if len(self._groups[key]) == max(
            MOST_BRANCHES // self._beams, 1
        ):  # close the group: its key is free for another
            closed = object()
            self._groups[closed], self._tokens[closed] = self._groups.pop(key), self._tokens.pop(key)
        for picture in pictures:
            if picture.hash not in self.pixels:
                self.pixels[picture.hash] = model.processor.pixels(picture.image, picture.plan)
        return True

    def halves(self, model: MMultiModal) -> Iterator["PromptBatch"]:
        """Yield two batches with the first and the last half of the prompts."""
        middle = len(self.prompts) // 2
        for prompts in (self.prompts[:middle], self.prompts[middle:]):
            # no limit: questions of a photo may be grouped otherwise than in the whole, and take more slots than it
            half = PromptBatch(sys.maxsize, self._beams)
            for prompt in prompts:
                half.add(model, prompt, [])
            half.pixels = {photo: self.pixels[photo] for prompt in prompts for photo in prompt.photos}
            yield half

    @property
    def groups(self) -> list[list[int]]:
        """Numbers of the prompts of each group."""
        return list(self._groups.values())


def batch_tokens(model: MMultiModal) -> int:
    """Return the number of tokens of a batch: `BATCH_TOKENS`, or as many as `BATCH_BYTES` hold."""
    config, attention = model.LLM.config, model.language_model.model.layers[0].self_attn
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * attention.head_dim  # of a token
    return min(BATCH_TOKENS, BATCH_BYTES // (numbers * model.LLM.dtype.itemsize))


@torch.no_grad()
def answer_batch(
    model: MMultiModal, batch: PromptBatch, settings: Generate, one_pass: Callable[[], AbstractContextManager]
) -> list[Reply]:
    """Return the answer to each prompt.

    Args:
        model: in eval mode.
        one_pass: context of each pass, because the model may run no other meanwhile.
    """
    order = [number for group in batch.groups for number in group]  # the cache counts questions in this order
    answers = [OpenAnswer(model, batch.prompts[number], settings) for number in order]
    waiting = list(range(len(answers)))
    cache = None
    began = time.perf_counter()
    while waiting:
        with one_pass():
            if cache is None:
                states, cache = read_prompts(model, batch)
            else:
                states = read_tokens(model, cache, waiting, [answers[question].tokens[-1] for question in waiting])
            logits = model.language_model.head(states).float()  # (N, V)
        suppress(model, logits)
        tokens = _choose(logits, [answers[question] for question in waiting])
        seconds, began = time.perf_counter() - began, time.perf_counter()
        for question, token in zip(waiting, tokens, strict=True):
            answers[question].add(token, seconds)
        waiting = [question for question in waiting if answers[question].reason is None]
    found = dict(zip(order, answers, strict=True))
    return [found[number].reply() for number in range(len(order))]


def _images(model: MMultiModal, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encode and project all photos: hash → pixels (crops, 3, H, W) to hash → image tokens (crops, M, Dl)."""
    if not pixels:
        return {}
    images = model.project(model.encode_image(torch.cat(list(pixels.values())).to(model.device)))
    return dict(zip(pixels, images.split([len(crops) for crops in pixels.values()]), strict=True))


def read_tokens(model: MMultiModal, cache: BranchCache, questions: list[int], tokens: list[int]) -> torch.Tensor:
    """Process the newest token of each question; return their last states (N, Dl)."""
    positions = cache.begin_pass(questions)
    embeddings = model.language_model.get_input_embeddings()(torch.tensor([tokens], device=model.device))
    return model.language_model.packed_states(embeddings, positions, None, cache=cache)[0]


def read_prompts(model: MMultiModal, batch: PromptBatch, beams: int = 1) -> tuple[torch.Tensor, BranchCache]:
    """Process all prompts; return the last states (N, Dl), and the keys and values, for `beams` answers to each."""
    images = _images(model, batch.pixels)
    ids: list[int] = []
    lengths, last, shown = [], [], []
    for group in batch.groups:
        prompts = [batch.prompts[number] for number in group]
        shared = prompts[0].photos_end
        texts = [prompt.ids[shared:-1] for prompt in prompts]  # the last token of a prompt is in its branch
        prefix = shared + min(common_length(texts[0], text) for text in texts)
        lengths.append((prefix, *(len(prompt.ids) - prefix for prompt in prompts)))
        shown += [images[photo] for photo in prompts[0].photos]
        ids += prompts[0].ids[:prefix]
        for prompt in prompts:
            ids += prompt.ids[prefix:]
            last.append(len(ids) - 1)
    row = torch.tensor([ids], device=model.device)  # (1, T)
    selected = torch.zeros_like(row, dtype=torch.bool)
    selected[0, last] = True
    positions = torch.cat([sample_positions(segments) for segments in lengths]).unsqueeze(0).to(model.device)
    limits = [batch.prompts[number].limit for group in batch.groups for number in group]
    cache = BranchCache(tuple(lengths), limits, model.LLM.config.num_hidden_layers, model.device, beams)
    embeddings = model.language_model.embed(row, torch.cat(shown) if shown else None)
    return model.language_model.packed_states(embeddings, positions, tuple(lengths), selected, cache), cache


def _choose(logits: torch.Tensor, answers: list[OpenAnswer]) -> list[int]:
    """Choose the next token of each answer by its row of `logits` (N, V)."""
    if answers[0].choice.takes_likeliest:
        return logits.argmax(-1).tolist()
    return [answer.choice.token(row) for answer, row in zip(answers, logits, strict=True)]
