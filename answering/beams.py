"""Beam search: instead of the likeliest next token, the answer that is likeliest as a whole. Used by `answer.py`.

The rules are those of transformers' `generate` with `num_beams`: an answer is scored by its log probability, divided by
the number of its tokens, end token included, to the power of `length_penalty` (1: their mean). A search ends when no
open beam has a better score than the worst of `num_beams` ended ones. The beams of a question are branches behind its
prompt (`qwen/branches.py`), so all of them share its keys.

Shapes: N questions that have not ended, W beams of each, V vocabulary.
"""

import time

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from answering.batches import PromptBatch, read_prompts, read_tokens
from answering.choice import suppress
from answering.open_answer import OpenAnswer
from answering.request import OpenPrompt, Reply
from config import Generate
from model.model import MMultiModal
from qwen.branches import BranchCache


def has_beams(settings: Generate) -> bool:
    """Whether answers are searched for; drawn ones are not."""
    return settings.num_beams > 1 and settings.temperature == 0


class BeamSearch:
    """The search for the answers to a batch; call `step` until nothing is `waiting`.

    Args:
        model: in eval mode.
        batch: made for as many beams.
    """

    def __init__(self, model: MMultiModal, batch: PromptBatch, settings: Generate) -> None:
        self._model, self._batch, self._settings = model, batch, settings
        self._order = [number for group in batch.groups for number in group]  # the cache counts questions so
        stop_ids = model.processor.chat.stop_ids
        self._beams = [_Beams(batch.prompts[number], settings, stop_ids, model.device) for number in self._order]
        self._cache: BranchCache | None = None
        self._seconds: list[float] = []  # of each pass
        self.waiting = list(range(len(self._beams)))

    def step(self) -> None:
        """Run one pass, which adds a token to each beam."""
        began, width = time.perf_counter(), self._settings.num_beams
        beams = [width * question + beam for question in self.waiting for beam in range(width)]
        if self._cache is None:
            states, self._cache = read_prompts(self._model, self._batch, width)
        else:
            newest = [tokens[-1] for question in self.waiting for tokens in self._beams[question].tokens]
            states = read_tokens(self._model, self._cache, beams, newest)
        scores = self._model.language_model.head(states).float().log_softmax(-1)  # (N × W, V); first pass: (N, V)
        parents = []
        for question, own in zip(self.waiting, scores.split(len(scores) // len(self.waiting)), strict=True):
            parents += [width * question + parent for parent in self._beams[question].grow(self._model, own)]
        self._cache.follow(beams, parents)
        self.waiting = [question for question in self.waiting if not self._beams[question].ended]
        self._seconds.append(time.perf_counter() - began)

    def replies(self) -> list[Reply]:
        """Return the answer to each prompt, once the search has ended."""
        found = {}
        for number, beams in zip(self._order, self._beams, strict=True):
            answer = OpenAnswer(self._model, self._batch.prompts[number], self._settings)
            tokens = beams.best()
            for token, seconds in zip(
                tokens, self._seconds[: len(tokens)], strict=True
            ):  # later passes were for others
                if answer.reason is None:  # a stop string may end it
                    answer.add(token, seconds)
            found[number] = answer.reply()
        return [found[number] for number in range(len(found))]


class _Beams:
    """The open and the ended answers to one question.

    Attributes:
        tokens: of each open answer.
        ended: whether the best answer is known.
    """

    def __init__(self, prompt: OpenPrompt, settings: Generate, stop_ids: set[int], device: torch.device) -> None:
        self.tokens: list[list[int]] = [[]]
        self.ended = False
        self._prompt, self._width, self._stop_ids = prompt, settings.num_beams, stop_ids
        self._length_penalty = settings.length_penalty
        self._totals = torch.zeros(1, device=device)  # log probability of each open answer
        self._done: list[tuple[float, list[int]]] = []  # score and tokens, the best first
        self._penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)

    def grow(self, model: MMultiModal, scores: torch.Tensor) -> list[int]:
        """Go on with the best continuations; return for each beam the one it continues.

        Args:
            scores: (W, V) log probabilities of the next token of each open answer.
        """
        if self._penalty.penalty != 1:
            history = torch.tensor([self._prompt.ids + tokens for tokens in self.tokens], device=scores.device)
            scores = self._penalty(history, scores)
        suppress(model, scores)
        totals = (self._totals[:, None] + scores).flatten()
        # so many that enough are left if each stop token is among the best of each beam
        best, places = totals.topk(min(max(2, 1 + len(self._stop_ids)) * self._width, len(totals)))
        grown: list[tuple[float, int, list[int]]] = []
        for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, scores.shape[1])
            tokens = [*self.tokens[parent], token]
            if token not in self._stop_ids and len(tokens) < self._prompt.limit:
                grown.append((total, parent, tokens))
            elif rank < self._width:
                self._done.append((self._score(total, tokens), tokens))
        self._done = sorted(self._done, key=lambda done: -done[0])[: self._width]
        if not grown:
            self.ended = True
            return [0] * self._width
        grown = grown[: self._width]
        self._totals = best.new_tensor([total for total, _, _ in grown])
        self.tokens = [tokens for _, _, tokens in grown]
        full = len(self._done) == self._width
        self.ended = full and self._score(grown[0][0], self.tokens[0]) <= self._done[-1][0]
        return [parent for _, parent, _ in grown]

    def _score(self, total: float, tokens: list[int]) -> float:
        return total / len(tokens) ** self._length_penalty

    def best(self) -> list[int]:
        """Return the tokens of the best answer, its end token included."""
        return self._done[0][1]
