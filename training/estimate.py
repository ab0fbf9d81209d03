"""Memory and time of micro-batches, measured by trial passes; they determine the `auto` values of the config.

Forward and backward passes over the longest sample, at several batch sizes, give peak memory and time of a micro-batch
as linear functions of its tokens. The size of the optimizer state is known exactly. No step is made, so the trial does
not change the weights. Called by `build.py` and `dry_run.py`.
"""

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from accelerate.utils import gather_object

from batch import Batch
from config import Train
from dataset.image_caption_dataset import ImageCaptionDataset, Sample, collate
from errors import UserError, is_out_of_memory

USABLE = 0.9  # share of the memory to plan with; the rest is for fragmentation and for other programs
ADAMW_BYTES = 8  # optimizer state per trained parameter: two float32

# (batch or None for no pass, gradient checkpointing) → (peak bytes, seconds) of forward and backward
Trial = Callable[[Batch | None, bool], tuple[int, float]]


@dataclass(frozen=True)
class Setting:
    """Micro-batch size, accumulation and gradient checkpointing of an optimizer step on each process."""

    micro_batch: int
    accumulation: int
    checkpointing: bool


@dataclass(frozen=True)
class Line:
    """Linear function `base + slope · tokens`."""

    base: float
    slope: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        slope = max((second[1] - first[1]) / (second[0] - first[0]), 0.0)
        return cls(second[1] - slope * second[0], slope)

    def __call__(self, tokens: float) -> float:
        return self.base + self.slope * tokens


class Estimate:
    """Peak bytes and seconds of a forward and backward pass by tokens; measured at the first call.

    Args:
        trial: measures one batch.
        sample: the longest sample.
        limit: usable bytes of this device.
        trained: number of trained parameters.
        budget: `train.tokens_per_batch`.

    Attributes:
        longest: tokens of the longest sample.
    """

    def __init__(self, trial: Trial, sample: Sample, limit: int, trained: int, budget: int | None) -> None:
        self.trial, self.sample, self.limit, self.budget = trial, sample, limit, budget
        self.state_bytes = ADAMW_BYTES * trained
        self.longest = len(sample.input_ids)
        self._lines: dict[bool, tuple[Line, Line]] = {}

    def memory(self, tokens: int, checkpointing: bool) -> float:
        """Return the peak bytes of a micro-batch with `tokens` tokens."""
        return self._measured(checkpointing)[0](tokens)

    def seconds(self, tokens: float, checkpointing: bool) -> float:
        """Return the seconds of one micro-batch with `tokens` tokens."""
        return self._measured(checkpointing)[1](tokens)

    def most_tokens(self, micro_batch: int) -> int:
        """Return the most tokens a micro-batch can have: from the longest sample or, if set, from the budget."""
        return micro_batch * self.longest if self.budget is None else max(self.budget, self.longest)

    def fits(self, setting: Setting) -> bool:
        """Return whether the micro-batches of `setting` fit into `limit`."""
        return self.memory(self.most_tokens(setting.micro_batch), setting.checkpointing) <= self.limit

    def _measured(self, checkpointing: bool) -> tuple[Line, Line]:
        if checkpointing not in self._lines:
            self._lines[checkpointing] = self._measure(checkpointing)
        return self._lines[checkpointing]

    def _measure(self, checkpointing: bool) -> tuple[Line, Line]:
        before = self.trial(None, checkpointing)[0]
        try:
            self.trial(self.copies(1), checkpointing)  # warm-up: allocates the gradients
            one = self.trial(self.copies(1), checkpointing)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Line(float("inf"), 0.0), Line(float("inf"), 0.0)
        # use the largest sizes predicted to fit; a wider spread makes the slopes less noisy
        sizes = next((sizes for sizes in ((2, 4), (2,)) if before + sizes[-1] * (one[0] - before) < self.limit), ())
        points = [(0, before, 0.0), (self.longest, *one)]
        for size in sizes:
            try:
                points.append((size * self.longest, *self.trial(self.copies(size), checkpointing)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break  # the prediction was wrong; use the smaller sizes
        memory = Line.through(points[1 if len(points) > 2 else 0][:2], points[-1][:2])
        # use the largest sizes for time: with one sample, kernel launches take most of the time on a GPU
        (few, _, quicker), (many, _, slower) = points[-2:]
        seconds = Line.through((few, quicker), (many, slower))
        return Line(memory.base + self.state_bytes, memory.slope), seconds

    def copies(self, number: int) -> Batch:
        """Return a batch of `number` copies of the longest sample; each copy has photos of its own."""
        copies = []
        for copy in range(number):
            new = {ID: number * place + copy for place, ID in enumerate(self.sample.photos)}
            photos = {new[ID]: crops for ID, crops in self.sample.photos.items()}
            photo_ids = tuple(new[ID] for ID in self.sample.photo_ids)
            copies.append(dataclasses.replace(self.sample, photos=photos, photo_ids=photo_ids))
        batch = collate(copies)
        assert isinstance(batch, Batch), "the sample was checked"
        return batch


def choose_setting(train: Train, estimate: Callable[[], Estimate]) -> Setting:
    """Return the setting of the config; replace `auto` by the largest micro-batch that fits on every process.

    Args:
        estimate: called only for an `auto`.

    Raises:
        UserError: a single sample does not fit.
    """
    if train.micro_batch != "auto" and train.gradient_checkpointing != "auto":
        return Setting(train.micro_batch, train.accumulation, train.gradient_checkpointing == "on")
    measured = estimate()
    # try without checkpointing first: recomputation costs more than a larger micro-batch gains
    modes = [False, True] if train.gradient_checkpointing == "auto" else [train.gradient_checkpointing == "on"]
    settings = (setting for checkpointing in modes for setting in possible_settings(train, checkpointing))
    choices = gather_object([next((setting for setting in settings if measured.fits(setting)), None)])
    if None in choices:
        raise UserError(
            f"one training sample of {measured.longest:,} tokens does not fit into the {measured.limit / 2**30:.1f} "
            "GiB that can be used here: lower train.max_questions or data.max_length, set "
            "train.gradient_checkpointing=on or llm.quantization=nf4, or take a smaller language model"
        )
    return min(choices, key=lambda choice: (not choice.checkpointing, choice.micro_batch))


def possible_settings(train: Train, checkpointing: bool) -> list[Setting]:
    """Return all settings of the configured optimizer step, largest micro-batch first."""
    if train.micro_batch != "auto":
        return [Setting(train.micro_batch, train.accumulation, checkpointing)]
    samples = train.samples_per_step
    assert samples is not None, "the schema asks for it beside micro_batch: auto"
    sizes = [2**power for power in range(samples.bit_length())]
    return [Setting(size, samples // size, checkpointing) for size in reversed(sizes) if samples % size == 0]


def usable_memory(device: torch.device) -> int:
    """Return the bytes this process can plan with, including the memory it already uses."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE * (free + torch.cuda.memory_reserved(device)))
    return int(USABLE * (psutil.virtual_memory().available + psutil.Process().memory_info().rss))


def longest_sample(dataset: ImageCaptionDataset) -> int:
    """Return the index of approximately the longest sample; counting the tokens of all samples takes too long.

    The 32 samples with the most photo tokens and text are tokenized, where three characters count as a token.
    """

    def tokens_of(images: Sequence[int]) -> int:
        try:
            return sum(dataset.plan(ID).tokens for ID in images)
        except UserError:  # training reports the error when it reads this photo
            return 0

    def size(index: int) -> float:
        entries = [dataset.entries[number] for number in dataset.groups[index]]
        shared = len(entries[0].turns[0].images) if len(entries) > 1 else 0
        before = tokens_of(entries[0].images[:shared])
        total = float(before)
        for entry in entries:  # each is cut by itself
            text = sum(len(turn.question) + max(map(len, turn.answers)) for turn in entry.turns) / 3
            total += min(tokens_of(entry.images[shared:]) + text, max(dataset.max_length - before, 0))
        return total

    candidates = heapq.nlargest(32, range(len(dataset)), key=size)
    return max(candidates, key=dataset.length)
