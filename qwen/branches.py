"""Keys and values of questions that are answered together, those of a shared prefix once.

The prompts are read as one packed row (`attention.py`), a sample per prefix and a branch per question. Later passes
read one new token of each question. Called by `Mqwen.py::packed_states`; `answering/batches.py` runs the passes.

    sample 0:  prefix | branch 1 | branch 2 | new token of 1 | of 2 | of 1 | of 2 | of 2 …
    sample 1:  prefix | branch 1 | new token of 1 | of 1 …

A slot holds one token. A mask says which slots a question sees, so the order of the slots is free: nothing moves when a
question ends, and no prefix is copied for each of its questions.

Shapes: S samples, J branches of a sample at most, C slots of a sample, K slots in use, N questions of a pass, H and G
query and key heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from batch import Lengths

# new tokens a question gets room for at a time: growing copies all keys, which costs about as much as one pass
ROOM = 16


class TokensBefore(Protocol):
    """What new tokens attend to: a `BranchCache`, or the memory of one answer (`answering/token_graph.py`)."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """See `BranchCache.attend`."""


class BranchCache:
    """Keys and values of a packed row and of the tokens that follow in its branches.

    Questions are counted through all samples, in the order of their branches.

    Args:
        lengths: segment lengths of the row; every sample has a prefix and at least one branch.
        new_tokens: most new tokens of each question.
        layers: number of layers.
        device: of the masks.
        beams: continuations of each branch of the row; each counts as a question and branch of its own, beside the
            others of its branch, and can go on from any of them (`follow`).
    """

    def __init__(
        self, lengths: Lengths, new_tokens: Sequence[int], layers: int, device: torch.device, beams: int = 1
    ) -> None:
        self.lengths = lengths
        self._keys: list[torch.Tensor] = [torch.empty(0)] * layers  # (S, G, C, D) each
        self._values = [*self._keys]
        self._used = [sum(segments) for segments in lengths]
        copies = range(beams)
        self._sample = [number for number, (_, *branches) in enumerate(lengths) for _ in branches for _ in copies]
        self._branch = [number for _, *branches in lengths for number in range(beams * len(branches))]
        # position of the next token
        self._next = [prefix + length for prefix, *branches in lengths for length in branches for _ in copies]
        most = beams * (max(len(segments) for segments in lengths) - 1)
        limits = iter(new_tokens)
        self._most_slots = max(sum(segments) + beams * sum(next(limits) for _ in segments[1:]) for segments in lengths)
        slots = min(max(self._used) + ROOM * most, self._most_slots)
        self._visible = torch.zeros(len(lengths), most, slots, dtype=torch.bool, device=device)  # (S, J, C)
        self._position = torch.zeros(len(lengths), slots, dtype=torch.long, device=device)
        self._latest = torch.zeros(len(lengths), most, dtype=torch.long, device=device)  # position of the new token
        for number, (prefix, *branches) in enumerate(lengths):
            self._visible[number, :, :prefix] = True
            self._position[number, :prefix] = torch.arange(prefix)
            start = prefix
            for branch, length in enumerate(branches):
                self._visible[number, beams * branch : beams * (branch + 1), start : start + length] = True
                self._position[number, start : start + length] = torch.arange(prefix, prefix + length)
                start += length
        self._place = (torch.empty(0, dtype=torch.long),) * 3  # sample, branch and slot (N,) of each new token
        self._scores: dict[tuple, torch.Tensor] = {}

    @property
    def slots(self) -> int:
        """Number of slots that memory is held for, of all samples."""
        return self._visible.shape[0] * self._visible.shape[2]

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the keys and values (1, G, T, D) of the packed row."""
        _, groups, _, width = key.shape
        shape = (len(self.lengths), groups, self._visible.shape[2], width)
        self._keys[layer], self._values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        start = 0
        for number, segments in enumerate(self.lengths):
            size = sum(segments)
            self._keys[layer][number, :, :size] = key[0, :, start : start + size]
            self._values[layer][number, :, :size] = value[0, :, start : start + size]
            start += size

    def begin_pass(self, questions: Sequence[int]) -> torch.Tensor:
        """Make room for one new token of each of `questions`, which have not ended; return the positions (1, N)."""
        samples = sorted({self._sample[question] for question in questions})
        if 2 * len(samples) <= len(self._used):
            self._drop_others(samples)
        slots = []
        for question in questions:
            slots.append(self._used[self._sample[question]])
            self._used[self._sample[question]] += 1
        if max(self._used) > self._visible.shape[2]:
            room = ROOM * self._visible.shape[1]
            self._grow(min(max(self._used) + room, self._most_slots) - self._visible.shape[2])
        device = self._visible.device
        sample = torch.tensor([self._sample[question] for question in questions], device=device)
        branch = torch.tensor([self._branch[question] for question in questions], device=device)
        slot = torch.tensor(slots, device=device)
        positions = torch.tensor([self._next[question] for question in questions], device=device)
        for question in questions:
            self._next[question] += 1
        self._place = (sample, branch, slot)
        self._visible[sample, branch, slot] = True
        self._position[sample, slot] = positions
        self._latest[sample, branch] = positions
        self._scores.clear()
        return positions.unsqueeze(0)

    def follow(self, questions: Sequence[int], parents: Sequence[int]) -> None:
        """Let each of `questions` go on from what one of `parents` has seen, the question beside it or itself.

        Only the mask changes: the tokens of a beam that nothing follows stay in their slots, where nothing sees them.
        """
        device = self._visible.device
        sample = torch.tensor([self._sample[question] for question in questions], device=device)
        branch, parent = (
            torch.tensor([self._branch[question] for question in numbers], device=device)
            for numbers in (questions, parents)
        )
        self._visible[sample, branch] = self._visible[sample, parent]

    def _drop_others(self, samples: list[int]) -> None:
        """Free all samples but `samples`."""
        kept = torch.tensor(samples, device=self._visible.device)
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[kept.to(tensor.device)]
        self._visible, self._position, self._latest = self._visible[kept], self._position[kept], self._latest[kept]
        self._used = [self._used[sample] for sample in samples]
        number_of = {sample: number for number, sample in enumerate(samples)}
        self._sample = [number_of.get(sample, -1) for sample in self._sample]  # -1: all its questions have ended

    def _grow(self, slots: int) -> None:
        """Add `slots` empty slots to each sample."""
        pad = torch.nn.functional.pad
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = pad(tensor, (0, 0, 0, slots))
        self._visible, self._position = pad(self._visible, (0, slots)), pad(self._position, (0, slots))

    def _mask(self, window: int | None, heads_per_key: int, like: torch.Tensor) -> torch.Tensor:
        """Additive scores (S, 1, heads_per_key × J, K), 0 or -inf, in dtype and device of `like`."""
        key = (window, heads_per_key, like.dtype, like.device)
        if key not in self._scores:  # shared by all layers of a pass
            used = max(self._used)
            visible = self._visible[:, :, :used]
            if window is not None:
                visible = visible & (self._latest[:, :, None] - self._position[:, None, :used] < window)
            scores = torch.zeros(visible.shape, dtype=like.dtype, device=visible.device)
            scores = scores.masked_fill(~visible, -torch.inf).unsqueeze(1)
            self._scores[key] = scores.repeat(1, 1, heads_per_key, 1).to(like.device)
        return self._scores[key]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention of one new token of each question, after its key and value were kept.

        The query heads of a key head and the branches of a sample are rows of one product, so the keys of a prefix are
        read once for all of them.

        Args:
            query: (1, H, N, D); key and value (1, G, N, D).
            window: number of positions that a token attends to, itself included; None: all.
            scaling: factor of the scores; None: D ** -0.5.

        Returns:
            (1, N, H, D).
        """
        sample, branch, slot = (index.to(query.device) for index in self._place)
        keys, values = self._keys[layer], self._values[layer]
        keys[sample, :, slot] = key[0].transpose(0, 1)
        values[sample, :, slot] = value[0].transpose(0, 1)
        (_, heads, count, width), groups = query.shape, key.shape[1]
        shape = (len(self._used), groups, heads // groups, self._visible.shape[1], width)
        rows = query.new_zeros(shape)  # (S, G, H / G, J, D)
        rows[sample, :, :, branch] = query[0].reshape(groups, heads // groups, count, width).permute(2, 0, 1, 3)
        used = max(self._used)
        attended = scaled_dot_product_attention(
            rows.flatten(2, 3),  # (S, G, H / G × J, D)
            keys[:, :, :used],
            values[:, :, :used],
            attn_mask=self._mask(window, heads // groups, query),
            scale=scaling,
        )
        return attended.reshape(shape)[sample, :, :, branch].reshape(1, count, heads, width)


@dataclass(frozen=True)
class NewTokensMask:
    """Mask of one layer type over a pass of new tokens, passed instead of a mask tensor; `window` as in `attend`."""

    cache: TokensBefore
    window: int | None
