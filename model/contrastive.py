"""Image-text contrastive loss term (`train.contrastive_weight`). Called by `model.py`.

It makes the projected features of a photo similar to the words of its own answers and dissimilar to those of other
photos in the micro-batch, as in CLIP (Radford et al. 2021, arXiv 2103.00020).

Shapes: T tokens of the row, P samples with a photo, Dl width.
"""

import torch
from torch.nn import functional

from batch import Batch
from qwen.chat import IGNORE_INDEX

TEMPERATURE = 0.07  # CLIP's initial value


def contrastive_loss(batch: Batch, embeddings: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Mean cross-entropy of matching each photo to its answers among all photos, in both directions.

    Args:
        embeddings: (1, T, Dl) input embeddings of the row, with the projected features at the placeholders.

    Returns:
        float32 scalar; 0 with a graph if fewer than two samples have a photo.
    """
    own: list[list[int]] = []  # crops of each sample with a photo; equal crops mean equal photos
    photos, texts = [], []
    start = crops = 0
    placeholders = int((batch.input_ids == image_token_id).sum())
    for lengths in batch.lengths:
        end = start + sum(lengths)
        rows = embeddings[0, start:end].float()  # (L, Dl)
        is_photo = batch.input_ids[0, start:end] == image_token_id
        if is_photo.any():
            assert batch.crop_index is not None, "a batch with placeholders has photos"
            count = int(is_photo.sum()) * len(batch.crop_index) // placeholders
            own.append(batch.crop_index[crops : crops + count].tolist())
            photos.append(rows[is_photo].mean(dim=0))
            texts.append(rows[batch.labels[0, start:end] != IGNORE_INDEX].mean(dim=0))
            crops += count
        start = end
    if len(own) < 2:
        return embeddings.float().sum() * 0.0
    left = functional.normalize(torch.stack(photos), dim=1)  # (P, Dl)
    right = functional.normalize(torch.stack(texts), dim=1)
    with torch.autocast(left.device.type, enabled=False):  # 16 bits would round cosines by more than they differ
        scores = left @ right.T / TEMPERATURE  # (P, P)
    # another sample with the same photos is not a negative example
    other_copy = [[i != j and one == other for j, other in enumerate(own)] for i, one in enumerate(own)]
    scores = scores.masked_fill(torch.tensor(other_copy, device=scores.device), -torch.inf)
    targets = torch.arange(len(own), device=scores.device)
    return (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)) / 2
