"""Batches on their way from the data set to the loss: loader and checks.

Used by `loop.py`, `validation.py` and, for its trial passes, `build.py`.
"""

import math
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from batch import Batch
from dataset.image_caption_dataset import Sample, collate
from errors import UserError
from qwen.chat import IGNORE_INDEX
from training.signals import StopSignals, outlast_signals


def make_loader(
    dataset: Dataset,
    batches: list[list[int]],
    workers: int,
    device: torch.device,
    stop: StopSignals | None = None,
    at_once: int = 1,
    persistent: bool = False,
) -> DataLoader:
    """A loader that gives the samples of `batches`, which hold their indices, collated.

    Args:
        stop: while this says that the run lasts, no signal ends the workers; None: they are as torch makes them.
        at_once: micro-batches that a step asks for together; so many are prefetched.
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
        generator=torch.Generator(),  # without one, each epoch would move the global generator
        worker_init_fn=None if stop is None else partial(outlast_signals, stop.running),
    )


def checked(sample: Sample | str) -> Sample:
    """The sample itself.

    Raises:
        UserError: it is a sentence: a photo could not be read, or a question is too long.
    """
    if isinstance(sample, str):
        raise UserError(f"{sample} (python process_image.py with data.check_images=open finds all such photos)")
    return sample


def supervised_tokens(batch: Batch) -> int:
    """Number of labels the loss of a batch is summed over."""
    return int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
