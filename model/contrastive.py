"""An image-text contrastive term beside the loss of the answers (`train.contrastive_weight`). Called by `model.py`.

It pulls what the projector makes of a photo towards the words of its own answers and away from those of the other
photos of the micro-batch, as CLIP does (Radford et al. 2021, arXiv 2103.00020).

Shapes: T tokens of the row, P samples with a photo, Dl width.
"""

import torch
from torch.nn import functional

from batch import Batch
from qwen.chat import IGNORE_INDEX

TEMPERATURE = 0.07  # the value that CLIP starts with


def contrastive_loss(batch: Batch, embeddings: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Mean cross-entropy of finding each photo's answers among those of all photos, and the other way round.

    Args:
        embeddings: (1, T, Dl) input embeddings of the row, with the projected features in the photos' places.

    Returns:
        float32 scalar; 0 with a graph where fewer than two samples have a photo.
    """
    own: list[int] = []  # the first crop of each sample with a photo, which tells equal photos
    photos, texts = [], []
    start = crops = 0
    placeholders = int((batch.input_ids == image_token_id).sum())
    for lengths in batch.samples:
        end = start + sum(lengths)
        rows = embeddings[0, start:end].float()  # (L, Dl)
        is_photo = batch.input_ids[0, start:end] == image_token_id
        if is_photo.any():
            assert batch.crop_index is not None, "a batch with placeholders has photos"
            own.append(int(batch.crop_index[crops]))
            photos.append(rows[is_photo].mean(dim=0))
            texts.append(rows[batch.labels[0, start:end] != IGNORE_INDEX].mean(dim=0))
            crops += int(is_photo.sum()) * len(batch.crop_index) // placeholders
        start = end
    if len(own) < 2:
        return embeddings.float().sum() * 0.0
    left = functional.normalize(torch.stack(photos), dim=1)  # (P, Dl)
    right = functional.normalize(torch.stack(texts), dim=1)
    scores = left @ right.T / TEMPERATURE  # (P, P)
    same = torch.tensor(own, device=scores.device)
    # another sample on the same photo is no counterexample
    other_copy = (same[:, None] == same[None, :]) & ~torch.eye(len(own), dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(other_copy, -torch.inf)
    targets = torch.arange(len(own), device=scores.device)
    return (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)) / 2
