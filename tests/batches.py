"""Padded rows as the packed row that training uses, so that both ways can be compared."""

import torch

from batch import Batch, sample_positions


def as_packed(image, input_ids, labels, attention_mask) -> Batch:
    """The rows of a right-padded batch one after another, without the padding; `image` in reading order."""
    lengths = attention_mask.sum(1).tolist()
    real = attention_mask.bool()
    return Batch(
        input_ids=input_ids[real][None],
        labels=labels[real][None],
        position_ids=torch.cat([sample_positions((length,)) for length in lengths])[None],
        lengths=tuple((length,) for length in lengths),
        pixel_values=image,
        crop_index=torch.arange(len(image)),
    )
