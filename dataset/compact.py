"""A list in memory that worker processes share. Used by `image_caption_dataset.py` and `training/data.py`."""

import itertools
import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import Any


class CompactList(Sequence):
    """A list stored as one block of bytes; items are decoded on access.

    Reading a Python object changes its reference count, so each forked worker gets its own copy of the memory pages:
    540 MiB per worker for 310,000 entries and their photos. A block has no reference counts and takes 84 MiB. Spawned
    workers receive the block directly; pickling the objects would take 10 s per worker.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        pickles = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = array("q", itertools.accumulate(map(len, pickles)))
        self.block = b"".join(pickles)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # IndexError ends a `for` loop
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.block[start : self.ends[index]])


def compact(items: Sequence[Any]) -> Sequence[Any]:
    """Return a list as a CompactList; anything else is in a form that workers share already."""
    return CompactList(items) if isinstance(items, list | tuple) else items
