"""Counts and checks of an optimizer step, made before it changes any weight. Called by `loop.py`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from batch import Batch
from dataset.image_caption_dataset import ImageCaptionDataset
from errors import UserError
from training.agreement import AgreedError
from training.batches import supervised_tokens
from training.build import Run

UNREADABLE_SHARE = 0.001  # unreadable photos per training sample; above this share, the run stops
MOST_SKIPPED = 50  # skipped steps in a row; the fp16 scaler halves its scale at each one, 2 ** -50 in all


class NonFiniteError(UserError):
    """The loss or its gradient is not finite; the weights are still those of the step before."""


def step_figures(run: Run, batches: list[Batch]) -> dict[str, Any]:
    """Return learning rates, arithmetic of this process's `batches`, and the number of replaced photos."""
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    encoded = sum(len(batch.pixel_values) for batch in batches if batch.pixel_values is not None)
    cached = sum(len(batch.image_features) for batch in batches if batch.image_features is not None)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    supervised = sum(map(supervised_tokens, batches))
    return {
        "rates": {f"{part.name}_lr": rates.get(part.name, 0.0) for part in run.model.parts},
        "operations": run.arithmetic.operations(tokens, supervised, encoded + cached, encoded),
        "replaced_photos": len(run.progress.unreadable),
    }


def count_tokens(run: Run, batches: Sequence[Batch | str]) -> tuple[list[Batch], int, int]:
    """Return the batches, their supervised tokens and all their tokens; both counts are sums over processes.

    Raises:
        AgreedError: a batch of any process is an error message, or too many photos cannot be read.
    """
    problem = next((batch for batch in batches if isinstance(batch, str)), None)
    sound = [batch for batch in batches if not isinstance(batch, str)]
    replaced = [sentence for batch in sound for sentence in batch.replaced]
    own = [sum(map(supervised_tokens, sound)), sum(batch.input_ids.numel() for batch in sound)]
    counts = torch.tensor([*own, len(replaced), problem is not None]).to(run.accelerator.device)
    supervised, tokens, replacements, problems = run.accelerator.reduce(counts).tolist()
    if problems:
        run.agree(problem)
    if replacements:
        _note_unreadable(run, gather_object(replaced))
    return sound, supervised, tokens


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
            f"{sentences[-1]}. python process_image.py data.check_images=open drops files that cannot be decoded"
        )


def require_finite(
    run: Run, loss: float, gradient_norm: float, finite: list[bool], indices: Sequence[list[int]]
) -> None:
    """Raise NonFiniteError for a non-finite loss or gradient, except for a few steps that the fp16 scaler skips."""
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
        f"{describe_samples(run.train_set, samples)}. Lower the learning rates (train.parts.*.lr), or set "
        "train.precision=float32"
    )


def describe_samples(dataset: ImageCaptionDataset, indices: list[int], most: int = 4) -> str:
    """Return photos and questions of samples as text for error messages."""
    texts = []
    for index in indices[:most]:
        entry = dataset.entries[dataset.groups[index][0]]
        photos = ", ".join(dataset.photos[ID].key for ID in entry.images) or "no photo"
        texts.append(f"{photos}: {entry.turns[0].question.strip()[:60]!r} (source {entry.source})")
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return "; ".join(texts) + more
