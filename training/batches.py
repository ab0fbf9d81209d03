"""Data loader, and checks of its samples and batches.

Used by `loop.py`, `validation.py`, `checks.py` and, for the trial passes, `build.py`.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from batch import Batch
from dataset.image_caption_dataset import Sample, collate
from errors import UserError
from qwen.chat import IGNORE_INDEX
from training.signals import StopSignals, outlast_signals


class EpochBatches:
    """The sample indices of the micro-batches `now`, which can be replaced between two iterations of a loader."""

    now: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


def make_loader(
    dataset: Dataset,
    batches: Sequence[list[int]] | EpochBatches,
    workers: int,
    device: torch.device,
    stop: StopSignals | None = None,
    at_once: int = 1,
    persistent: bool = False,
) -> DataLoader:
    """Make a loader that collates one batch for each list of sample indices in `batches`.

    Args:
        stop: protects the workers from signals while `stop.running` is 1; None: no protection.
        at_once: micro-batches that a step reads together; the loader prefetches at least this many.
        persistent: keep the workers between iterations.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(at_once / workers) + 1) if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # by default, each epoch would advance the global generator
        worker_init_fn=None if stop is None else partial(outlast_signals, stop.running),
    )


def checked(sample: Sample | str) -> Sample:
    """Return the sample unchanged.

    Raises:
        UserError: the data set returned an error message: an unreadable photo, or a question that is too long.
    """
    if isinstance(sample, str):
        raise UserError(f"{sample} (python process_image.py with data.check_images=open finds files that are damaged)")
    return sample


def supervised_tokens(batch: Batch) -> int:
    """Return the number of supervised labels of a batch; the loss sums over them."""
    return int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
