"""One micro-batch: a packed row of samples and the crops of their photos.

`dataset/image_caption_dataset.py` builds it. `MMultiModal.loss` and `qwen/attention.py` read it.

Shapes: T tokens of the row, C crops, R rows of a crop, Dv encoder width.
"""

import dataclasses
from dataclasses import dataclass

import torch

# per sample: token length of its prefix, then of each branch; a sample with one question has only a prefix
Lengths = tuple[tuple[int, ...], ...]


def sample_positions(lengths: tuple[int, ...]) -> torch.Tensor:
    """Return (L,) int64 positions of one sample; each branch starts at the end of the prefix."""
    prefix, *branches = lengths
    return torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in branches)])


@dataclass
class Batch:
    """A collated micro-batch.

    Attributes:
        input_ids, labels, position_ids: (1, T) int64; labels are -100 at unsupervised positions.
        lengths: segment lengths of the row, of each sample in turn.
        pixel_values: (C, 3, H, W) float32, each distinct crop once; None without photos or with cached features.
        image_features: (C, R, Dv) cached features, used instead of `pixel_values`.
        crop_index: (shown crops,) int64, the index of the crop at each run of placeholders, in reading order.
        replaced: one sentence per unreadable photo; another sample replaced its sample.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: Lengths
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    crop_index: torch.Tensor | None = None
    replaced: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return a copy with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory; torch's data loader calls this method."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: function(value) for name, value in values.items() if torch.is_tensor(value)}
        return dataclasses.replace(self, **changed)
