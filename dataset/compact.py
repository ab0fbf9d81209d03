"""A list that costs worker processes no memory of their own. Used by `image_caption_dataset.py`."""

import itertools
import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import Any


class CompactList(Sequence):
    """A list as one block of bytes, decoded item by item.

    Reading a Python object changes its reference count, so each forked worker ends with its own copy of every page that
    holds one: 540 MiB a worker for 310,000 entries and their photos. A block has no counts: 84 MiB. Spawned workers get
    the block as it is, while pickling and reading the objects takes 10 s for each worker.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        pickles = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = array("q", itertools.accumulate(map(len, pickles)))
        self.block = b"".join(pickles)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # `for item in …` ends here
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.block[start : self.ends[index]])
