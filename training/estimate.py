"""What a run will take, before it starts: `train.py --dry-run`. Two real steps are measured, nothing is kept."""

import random
import sys
from itertools import islice
from statistics import mean

import torch

from qwen.chat import IGNORE_INDEX
from training.loop import Trainer

SAMPLED = 200  # samples whose tokens are counted


def describe_run(trainer: Trainer) -> str:
    """Trainable parameters, token statistics, measured peak memory and time as a text of a few lines."""
    dataset, config = trainer.train_set, trainer.config
    chosen = random.Random(0).sample(range(len(dataset)), min(len(dataset), SAMPLED))
    samples = [dataset.tokens(index) for index in chosen]
    lengths = [len(sample["input_ids"]) for sample in samples]
    supervised = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples]
    questions = [len(dataset.groups[index]) for index in chosen]
    separate = [sum(len(dataset.render_entry(number)[0]) for number in dataset.groups[index]) for index in chosen]
    seconds, memory = _trial_steps(trainer)
    hours = seconds * trainer.total_steps / 3600
    lines = [
        trainer.model.parameter_summary(),
        f"samples: {len(dataset):,} for training with {len(dataset.entries):,} questions, {len(trainer.val_set):,} for "
        f"validation; {trainer.total_steps:,} steps, {trainer.steps_per_epoch:,} an epoch",
        f"tokens per sample: mean {mean(lengths):.0f}, longest {max(lengths)} (of {len(chosen)} looked at); "
        f"supervised {sum(supervised) / sum(lengths):.1%}",
        f"questions per sample: {mean(questions):.1f}; packing leaves {sum(lengths) / sum(separate):.0%} of the tokens",
        f"measured, {config.train.micro_batch} × {config.train.accumulation} samples a step in {trainer.precision}: "
        f"{seconds:.2f} s a step, peak memory {memory / 2**30:.1f} GiB",
        f"the whole run: about {hours * 60:.0f} minutes" if hours < 2 else f"the whole run: about {hours:.1f} hours",
    ]
    return "\n".join(lines)


def _trial_steps(trainer: Trainer) -> tuple[float, int]:
    """Seconds of a step once warm, and peak memory in bytes (of the GPU, else of this process)."""
    cuda = trainer.accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [figures["seconds"] for figures in islice(trainer.steps(), 2)][-1]
    return seconds, torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
