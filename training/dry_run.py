"""Estimated memory and time of a run: the text of `train.py --dry-run`. Called by `stages.py`."""

import contextlib
import random
from statistics import mean

from dataset.image_caption_dataset import BrokenPhotoError
from qwen.chat import IGNORE_INDEX
from training.build import Run
from training.estimate import Setting

SAMPLED = 200  # samples whose tokens are counted


def describe_run(run: Run) -> str:
    """Return a text with parameters, token statistics, and memory and time by setting."""
    dataset, chosen, estimate = run.train_set, run.setting, run.estimate
    sampled = random.Random(0).sample(range(len(dataset)), min(len(dataset), SAMPLED))
    samples = {}
    for index in sampled:
        with contextlib.suppress(BrokenPhotoError):  # training replaces the sample
            samples[index] = dataset.tokens(index)
    samples = samples or {sampled[0]: dataset.tokens(sampled[0])}  # raises the error of the first
    lengths = [len(sample.input_ids) for sample in samples.values()]
    supervised = [int((sample.labels != IGNORE_INDEX).sum()) for sample in samples.values()]
    questions = [len(dataset.groups[index]) for index in samples]
    separate = [
        sum(len(dataset.render_entry(number).input_ids) for number in dataset.groups[index]) for index in samples
    ]
    text = [
        run.model.parameter_summary(),
        f"samples: {len(dataset):,} for training with {len(dataset.entries):,} questions, {len(run.val_set):,} for "
        f"validation; {run.total_steps:,} steps, {run.steps_per_epoch:,} an epoch",
        f"tokens per sample: mean {mean(lengths):.0f} (of {len(samples)} samples), longest {estimate.longest}; "
        f"supervised {sum(supervised) / sum(lengths):.1%}",
        f"questions per sample: {mean(questions):.1f}; packing leaves {sum(lengths) / sum(separate):.0%} of the tokens",
        "",
        *_table(run, lengths),
    ]
    run.model.zero_grad()
    hours = _step_seconds(run, chosen, lengths) * run.total_steps / 3600
    time = f"about {hours * 60:.0f} minutes" if hours < 2 else f"about {hours:.1f} hours"
    text.append(f"the whole run: {time}")
    if run.config.train.word_alignment and run.config.train.init_from is None:
        text[-1] += ", and before it train.word_alignment, not measured here"
    return "\n".join(text)


def _step_seconds(run: Run, setting: Setting, lengths: list[int]) -> float:
    """Estimate the seconds of an optimizer step, for the mean of `lengths` or for a full token budget."""
    tokens = run.config.train.tokens_per_batch or setting.micro_batch * mean(lengths)
    return setting.accumulation * run.estimate.seconds(tokens, setting.checkpointing)


def _table(run: Run, lengths: list[int]) -> list[str]:
    chosen, budget, estimate = run.setting, run.config.train.tokens_per_batch, run.estimate
    per_step = chosen.micro_batch * chosen.accumulation
    sizes = {2**power for power in range(per_step.bit_length())} if budget is None else set()
    step = f"{per_step} samples" if budget is None else f"{chosen.accumulation} × {budget:,} tokens"
    kind = "GPU memory" if run.accelerator.device.type == "cuda" else "resident memory, a rough figure,"
    lines = [
        f"peak {kind} and time of an optimizer step of {step} on each process, in {run.precision};",
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
            mark = "*" if setting == chosen else " " if estimate.fits(setting) else "!"
            cells.append(f"{memory / 2**30:12.1f} {_step_seconds(run, setting, lengths):9.2f} {mark}")
        first = f"{size:11}" if budget is None else f"{budget:4} tokens"
        lines.append((f"{first} × {per_step // size:<12}" + "         ".join(cells)).rstrip())
    lines.append(f"* this run   ! does not fit into the {estimate.limit / 2**30:.1f} GiB that can be used here")
    return lines
