"""One micro-batch: a single row in which samples follow one another, and the crops of their photos.

`dataset/image_caption_dataset.py` makes it, `MMultiModal.loss` learns from it, `qwen/attention.py` reads `samples`.

Shapes: T tokens of the row, C crops, R rows of a crop, Dv encoder width.
"""

import dataclasses
from dataclasses import dataclass

import torch

# for each sample the length of its prefix, then those of its branches, in tokens; a sample with one question is a
# prefix alone
Samples = tuple[tuple[int, ...], ...]


def sample_positions(lengths: tuple[int, ...]) -> torch.Tensor:
    """(L,) int64 positions of one sample: each branch continues where the prefix ends."""
    prefix, *branches = lengths
    return torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in branches)])


@dataclass
class Batch:
    """A collated micro-batch.

    Attributes:
        input_ids, labels, position_ids: (1, T) int64; labels are -100 where nothing is asked.
        samples: the parts of the row.
        pixel_values: (C, 3, H, W) float32, each distinct crop once; None where there is none or features are cached.
        image_features: (C, R, Dv) in its place.
        crop_index: (shown crops,) int64, the row of either at each run of placeholders, in reading order.
        replaced: a sentence for each photo that could not be read and was replaced by another sample.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    samples: Samples
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    crop_index: torch.Tensor | None = None
    replaced: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """A copy with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; torch's loader calls it."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: function(value) for name, value in values.items() if torch.is_tensor(value)}
        return dataclasses.replace(self, **changed)
