"""What a run will take, before it starts: `train.py --dry-run`, and the choice behind `auto` in the config.

Nothing is guessed from formulas. Forward and backward passes over the longest sample, at two sizes, give peak memory
and time of a micro-batch as straight lines in its tokens; the optimiser's state is known exactly.
No step is made, so nothing is learned from the trial. Called by `train.py` and `loop.py`.
"""

import random
import time
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import gather_object

from dataset.image_caption_dataset import ImageCaptionDataset, collate
from errors import UserError
from qwen.chat import IGNORE_INDEX
from training.costs import PeakMemory

if TYPE_CHECKING:
    from training.loop import Trainer

SAMPLED = 200  # samples whose tokens are counted
USABLE = 0.9  # share of the memory that may be planned with; the rest goes to fragments and to what others need
ADAMW_BYTES = 8  # of state for each trained number: two float32


@dataclass(frozen=True)
class Setting:
    """How the samples of an optimiser step are cut up on each process."""

    micro_batch: int
    accumulation: int
    checkpointing: bool


@dataclass(frozen=True)
class Line:
    """`base + slope · tokens`."""

    base: float
    slope: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        slope = max((second[1] - first[1]) / (second[0] - first[0]), 0.0)
        return cls(second[1] - slope * second[0], slope)

    def __call__(self, tokens: float) -> float:
        return self.base + self.slope * tokens


class Estimate:
    """Peak bytes and seconds of forward and backward of a micro-batch, by its tokens; measured when first asked.

    Attributes:
        longest: tokens of the longest sample.
        limit: bytes that may be used on this device.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        index = longest_sample(trainer.train_set)
        self.sample = trainer.checked(trainer.train_set[index])
        self.longest = len(self.sample["input_ids"])
        self.limit = usable_memory(trainer.accelerator.device)
        self._lines: dict[bool, tuple[Line, Line]] = {}

    def memory(self, tokens: int, checkpointing: bool) -> float:
        """Bytes at the highest, of a micro-batch with so many tokens."""
        return self._measured(checkpointing)[0](tokens)

    def most_tokens(self, micro_batch: int) -> int:
        """Of a micro-batch of so many samples, were all as long as the longest; or the budget, where there is one."""
        budget = self.trainer.config.train.tokens_per_batch
        return micro_batch * self.longest if budget is None else max(budget, self.longest)

    def seconds(self, tokens: float, checkpointing: bool) -> float:
        """Of one micro-batch with so many tokens."""
        return self._measured(checkpointing)[1](tokens)

    def _measured(self, checkpointing: bool) -> tuple[Line, Line]:
        if checkpointing not in self._lines:
            self._lines[checkpointing] = self._measure(checkpointing)
        return self._lines[checkpointing]

    def _measure(self, checkpointing: bool) -> tuple[Line, Line]:
        before = self.trial(0, checkpointing)[0]
        try:
            self.trial(1, checkpointing)  # the first one also allocates the gradients
            one = self.trial(1, checkpointing)
        except torch.OutOfMemoryError:
            return Line(float("inf"), 0.0), Line(float("inf"), 0.0)
        # sizes as large as surely fit: the wider apart they are, the less does noise count
        sizes = next((sizes for sizes in ((2, 4), (2,)) if before + sizes[-1] * (one[0] - before) < self.limit), ())
        points = [(0, before, 0.0), (self.longest, *one)]
        points += [(size * self.longest, *self.trial(size, checkpointing)) for size in sizes]
        memory = Line.through(points[1 if sizes else 0][:2], points[-1][:2])
        # a single sample says little about time on a GPU, where starting kernels is all that counts
        seconds = Line.through(points[-2][::2], points[-1][::2])
        state = ADAMW_BYTES * sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        return Line(memory.base + state, memory.slope), seconds

    def copies(self, number: int) -> dict[str, Any]:
        """A batch of so many copies of the longest sample, as if their photos were different ones."""
        photos = len(self.sample.get("photo_ids", ()))
        own = [range(copy * photos, (copy + 1) * photos) for copy in range(number)]
        return collate([self.sample | ({"photo_ids": tuple(ids)} if photos else {}) for ids in own])

    def trial(self, copies: int, checkpointing: bool) -> tuple[int, float]:
        """(peak bytes, seconds) of forward and backward over `copies` of the longest sample, the quicker of two passes;
        the gradients stay, since they do between the micro-batches of a step."""
        trainer = self.trainer
        trainer.set_checkpointing(checkpointing)
        trainer.training_mode()
        batch = self.copies(copies) if copies else None
        seconds = []
        with PeakMemory(trainer.accelerator.device) as peak:
            for _ in range(2):
                began = time.perf_counter()
                if batch is not None:
                    with trainer.accelerator.no_sync(trainer.wrapped):
                        loss = trainer.forward(batch, 1)
                        trainer.accelerator.backward(loss)
                    loss.item()  # waits until the device is done
                seconds.append(time.perf_counter() - began)
        return peak.bytes, min(seconds)


def choose_setting(trainer: "Trainer") -> Setting:
    """What the config says, with its `auto` replaced by the largest micro-batch that fits.

    Raises:
        UserError: not even one sample fits.
    """
    train = trainer.config.train
    if train.micro_batch != "auto" and train.gradient_checkpointing != "auto":
        return Setting(train.micro_batch, train.accumulation, train.gradient_checkpointing == "on")
    estimate = trainer.estimate
    modes = [False, True] if train.gradient_checkpointing == "auto" else [train.gradient_checkpointing == "on"]
    fitting = (
        setting
        for checkpointing in modes  # off, as long as one sample fits: a larger micro-batch does not repay recomputing
        for setting in possible_settings(trainer, checkpointing)
        if estimate.memory(estimate.most_tokens(setting.micro_batch), checkpointing) <= estimate.limit
    )
    setting = next(fitting, None)
    trainer.model.zero_grad()
    choices = gather_object([setting])  # all processes do as the one with the least memory
    if None in choices:
        raise UserError(
            f"one training sample of {estimate.longest:,} tokens does not fit into the {estimate.limit / 2**30:.1f} "
            "GiB that can be used here: lower train.max_questions or data.max_length, set "
            "train.gradient_checkpointing=on or llm.quantization=nf4, or take a smaller language model"
        )
    return min(choices, key=lambda choice: (not choice.checkpointing, choice.micro_batch))


def possible_settings(trainer: "Trainer", checkpointing: bool) -> list[Setting]:
    """The ways to make the configured optimiser step, largest micro-batch first."""
    train = trainer.config.train
    if train.micro_batch != "auto":
        return [Setting(train.micro_batch, train.accumulation, checkpointing)]
    sizes = [2**power for power in range(train.samples_per_step.bit_length())]
    return [
        Setting(size, train.samples_per_step // size, checkpointing)
        for size in reversed(sizes)
        if train.samples_per_step % size == 0
    ]


def usable_memory(device: torch.device) -> int:
    """Bytes this process may plan with, what it holds already among them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE * (free + torch.cuda.memory_reserved(device)))
    return int(USABLE * (psutil.virtual_memory().available + psutil.Process().memory_info().rss))


def longest_sample(dataset: ImageCaptionDataset) -> int:
    """Index of the sample with most tokens among the 32 with most text; to count the tokens of all would take long."""

    def characters(index: int) -> int:
        entries = [dataset.entries[number] for number in dataset.groups[index]]
        return sum(len(turn.question) + max(map(len, turn.answers)) for entry in entries for turn in entry.turns)

    # photos cost more tokens than text
    photos = {index: len(dataset.entries[group[0]].images) for index, group in enumerate(dataset.groups)}
    most = max(photos.values())
    candidates = sorted((index for index in photos if photos[index] == most), key=characters, reverse=True)[:32]
    return max(candidates, key=lambda index: len(dataset.tokens(index)["input_ids"]))


def describe_run(trainer: "Trainer") -> str:
    """Parameters, token statistics, and memory and time by setting, as a text of a few lines."""
    dataset, chosen = trainer.train_set, trainer.setting
    looked_at = random.Random(0).sample(range(len(dataset)), min(len(dataset), SAMPLED))
    samples = [dataset.tokens(index) for index in looked_at]
    lengths = [len(sample["input_ids"]) for sample in samples]
    supervised = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples]
    questions = [len(dataset.groups[index]) for index in looked_at]
    separate = [sum(len(dataset.render_entry(number)[0]) for number in dataset.groups[index]) for index in looked_at]
    estimate = trainer.estimate
    text = [
        trainer.model.parameter_summary(),
        f"samples: {len(dataset):,} for training with {len(dataset.entries):,} questions, {len(trainer.val_set):,} for "
        f"validation; {trainer.total_steps:,} steps, {trainer.steps_per_epoch:,} an epoch",
        f"tokens per sample: mean {mean(lengths):.0f} (of {len(looked_at)} looked at), longest {estimate.longest}; "
        f"supervised {sum(supervised) / sum(lengths):.1%}",
        f"questions per sample: {mean(questions):.1f}; packing leaves {sum(lengths) / sum(separate):.0%} of the tokens",
        "",
        *_table(trainer, estimate, lengths),
    ]
    trainer.model.zero_grad()
    hours = step_seconds(estimate, chosen, lengths) * trainer.total_steps / 3600
    text.append(
        f"the whole run: about {hours * 60:.0f} minutes" if hours < 2 else f"the whole run: about {hours:.1f} hours"
    )
    return "\n".join(text)


def step_seconds(estimate: Estimate, setting: Setting, lengths: list[int]) -> float:
    """Of an optimiser step on samples of so many tokens each, or on micro-batches full to the budget."""
    tokens = estimate.trainer.config.train.tokens_per_batch or setting.micro_batch * mean(lengths)
    return setting.accumulation * estimate.seconds(tokens, setting.checkpointing)


def _table(trainer: "Trainer", estimate: Estimate, lengths: list[int]) -> list[str]:
    chosen, budget = trainer.setting, trainer.config.train.tokens_per_batch
    per_step = chosen.micro_batch * chosen.accumulation
    sizes = {2**power for power in range(per_step.bit_length())} if budget is None else set()
    step = f"{per_step} samples" if budget is None else f"{chosen.accumulation} × {budget:,} tokens"
    kind = "GPU memory" if trainer.accelerator.device.type == "cuda" else "resident memory, a rough figure,"
    lines = [
        f"peak {kind} and time of an optimiser step of {step} on each process, in {trainer.precision};",
        "measured on up to 4 copies of the longest sample, the rest extrapolated",
        "                             gradient checkpointing off      gradient checkpointing on",
        "micro_batch × accumulation         GiB   seconds                   GiB   seconds",
    ]
    for size in sorted(sizes | {chosen.micro_batch}):
        if per_step % size:
            continue
        cells = []
        for checkpointing in (False, True):
            setting = Setting(size, per_step // size, checkpointing)
            memory = estimate.memory(estimate.most_tokens(size), checkpointing)
            mark = "*" if setting == chosen else "!" if memory > estimate.limit else " "
            cells.append(f"{memory / 2**30:12.1f} {step_seconds(estimate, setting, lengths):9.2f} {mark}")
        first = f"{size:11}" if budget is None else f"{budget:4} tokens"
        lines.append((f"{first} × {per_step // size:<12}" + "         ".join(cells)).rstrip())
    lines.append(f"* this run   ! does not fit into the {estimate.limit / 2**30:.1f} GiB that can be used here")
    return lines
