"""One optimizer step, which changes nothing before loss and gradient are known to be finite. Called by `loop.py`."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object

from dataset.image_caption_dataset import ImageCaptionDataset
from errors import UserError
from training.agreement import AgreedError
from training.batches import supervised_tokens
from training.build import Run
from training.signals import SIGNALS, StopSignals

UNREADABLE_SHARE = 0.001  # of the training samples; a run that meets more photos it cannot read stops
MOST_SKIPPED = 50  # fp16's scaler halves its scale at each step it skips: by then it has fallen by 2 ** 50


class NonFiniteError(UserError):
    """The loss or its gradient is not a number; the weights are still those of the step before."""


def optimizer_step(
    run: Run, batches: list[dict[str, Any]], indices: list[list[int]], last_of_epoch: bool, stop: StopSignals
) -> dict[str, Any]:
    """Learn from the micro-batches of this process, move `run.progress` on, and return the figures of the step.

    Args:
        batches: from the loader; all processes have equally many.
        indices: samples of all processes' micro-batches, in turn.
        stop: holds the signal that this process got; `figures["signal"]` is what any process got, or 0.

    Raises:
        NonFiniteError: nothing was learned; names the samples.
        AgreedError: a batch that holds an error in place of samples, or too many photos that cannot be read.
    """
    supervised, tokens = _count(run, batches)
    run.training_mode()
    device, processes = run.accelerator.device, run.accelerator.num_processes
    total = torch.zeros((), device=device)
    finite = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.wrapped):
            # gradients are averaged over processes, the loss is meant to be summed
            loss = run.forward(batch, max(supervised, 1)) * processes
            run.accelerator.backward(loss)
        total += loss.detach()
        finite.append(loss.detach().isfinite())
    signals = torch.tensor([float(stop.received == number) for number in SIGNALS], device=device)
    loss_value, *signals = run.accelerator.reduce(torch.cat([total.unsqueeze(0), signals]), reduction="mean").tolist()
    gradient_norm = float(run.accelerator.clip_grad_norm_(run.wrapped.parameters(), run.config.train.max_grad_norm))
    _require_finite(run, loss_value, gradient_norm, torch.stack(finite).tolist(), indices)
    figures = _figures(run, batches) | {
        "loss": loss_value,
        "grad_norm": gradient_norm,
        "supervised_tokens": supervised,
        "tokens": tokens,
        "signal": next((int(number) for number, count in zip(SIGNALS, signals, strict=True) if count), 0),
    }
    run.whole_step = False  # while weights and position change, no checkpoint can be made
    run.optimizer.step()
    if not run.optimizer.step_was_skipped:  # by fp16's scaler; torch warns of a schedule that begins before the steps
        run.schedule.step()
    run.progress.advance(sum(map(len, indices)), last_of_epoch, device)
    run.whole_step = True
    run.optimizer.zero_grad()
    return figures


def _figures(run: Run, batches: list[dict[str, Any]]) -> dict[str, Any]:
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    encoded = sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)
    cached = sum(len(batch["image_features"]) for batch in batches if "image_features" in batch)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    supervised = sum(map(supervised_tokens, batches))
    return {
        "projector_lr": rates.get("projector", 0.0),
        "lora_lr": rates.get("lora", 0.0),
        "operations": run.arithmetic.operations(tokens, supervised, encoded + cached, encoded),
        "replaced_photos": len(run.progress.unreadable),
    }


def _count(run: Run, batches: list[dict[str, Any]]) -> tuple[int, int]:
    """Supervised tokens and all tokens of the step, summed over processes; also reports their bad photos to all."""
    problem = next((batch["error"] for batch in batches if "error" in batch), None)
    replaced = [sentence for batch in batches for sentence in batch.get("replaced", ())]
    sound = [batch for batch in batches if "error" not in batch]
    own = [sum(map(supervised_tokens, sound)), sum(batch["input_ids"].numel() for batch in sound)]
    counts = torch.tensor([*own, len(replaced), problem is not None]).to(run.accelerator.device)
    supervised, tokens, replacements, problems = run.accelerator.reduce(counts).tolist()
    if problems:
        run.agree(problem)
    if replacements:
        _note_unreadable(run, gather_object(replaced))
    return supervised, tokens


def _note_unreadable(run: Run, sentences: list[str]) -> None:
    new = sorted(set(sentences) - set(run.progress.unreadable))
    run.progress.unreadable += new
    if run.accelerator.is_main_process:
        for sentence in new:
            run.say(f"another sample replaces one whose photo cannot be read: {sentence}")
    bad, samples = len(run.progress.unreadable), len(run.train_set)
    if bad > max(1, UNREADABLE_SHARE * samples):
        raise AgreedError(
            f"{bad} photos of {samples} training samples cannot be read, more than {UNREADABLE_SHARE:.1%}; the last: "
            f"{sentences[-1]}. Run python process_image.py data.check_images=open, which drops them"
        )


def _require_finite(run: Run, loss: float, gradient_norm: float, finite: list[bool], indices: list[list[int]]) -> None:
    """Raise NonFiniteError unless the step may be made; fp16's scaler may skip some steps by itself."""
    progress = run.progress
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        progress.skipped = 0
        return
    if math.isfinite(loss) and run.accelerator.scaler is not None:
        progress.skipped += 1
        if progress.skipped < MOST_SKIPPED:
            return
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    own = indices[rank::processes]
    guilty = [index for batch, sound in zip(own, finite, strict=True) if not sound for index in batch]
    samples = gather_object(guilty) or [index for batch in indices for index in batch]
    what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient became {gradient_norm}"
    raise NonFiniteError(
        f"{what} at step {progress.step + 1}; nothing of it was learned, all checkpoints are as they were. Samples: "
        f"{describe_samples(run.train_set, samples)}. Lower train.projector_lr and train.lora_lr, or set "
        "train.precision=float32"
    )


def describe_samples(dataset: ImageCaptionDataset, indices: list[int], most: int = 4) -> str:
    """Photos and questions of samples, for messages."""
    texts = []
    for index in indices[:most]:
        entry = dataset.entries[dataset.groups[index][0]]
        photos = ", ".join(dataset.photos[ID].key for ID in entry.images) or "no photo"
        texts.append(f"{photos}: {entry.turns[0].question.strip()[:60]!r} (source {entry.source})")
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return "; ".join(texts) + more
