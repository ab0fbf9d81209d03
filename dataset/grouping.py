"""Which entries share one sequence (shared-image packing). Called by `image_caption_dataset.py`."""

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy

from config import IMAGE_TAG
from dataset.records import Entry

MOST_OPEN = 100_000  # groups that can still grow; above it they end with their photo, whose entries stand together


class IntegerLists(Sequence[list[int]]):
    """Lists of whole numbers in two arrays, which take 8 bytes a list and 4 bytes a number.

    Args:
        numbers: the numbers of all lists, one list after the other.
        ends: the end of each list in `numbers`.
    """

    def __init__(self, numbers: numpy.ndarray, ends: numpy.ndarray) -> None:
        self.numbers, self.ends = numbers.astype(numpy.int32), ends.astype(numpy.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return self.numbers[start : self.ends[index]].tolist()


class Groups(NamedTuple):
    """The entries of each sample, the number of its source (of its first entry), and the names of all sources."""

    entries: IntegerLists
    source_numbers: numpy.ndarray
    sources: list[str]


def group_entries(
    entries: Iterable[Entry],
    image_first: bool,
    max_questions: int,
    keep_apart: Callable[[str], Hashable] | None = None,
) -> Groups:
    """Group the entries that can share one sequence.

    Entries of a group have the same photos in the first turn, and the same text before the last of these photos.
    Entries without a photo in the first turn stay alone, because packing would save nothing.

    Args:
        keep_apart: gives a value for each source; entries with different values are in different groups.
    """
    group_of, source_of = array("i"), array("i")  # by entry
    numbers: dict[str, int] = {}
    open_groups: dict[tuple, list[int]] = {}  # number of the group, and how many entries it has
    count, last = 0, None
    for entry in entries:
        source_of.append(numbers.setdefault(entry.source, len(numbers)))
        images = entry.turns[0].images
        before = () if image_first or not images else tuple(entry.turns[0].question.split(IMAGE_TAG, len(images))[:-1])
        key = (images, before, None if keep_apart is None else keep_apart(entry.source))
        if images and images[:1] != last:
            if len(open_groups) >= MOST_OPEN:
                open_groups.clear()
            last = images[:1]
        if not images or key not in open_groups or open_groups[key][1] >= max_questions:
            open_groups[key] = [count, 0]
            count += 1
        group_of.append(open_groups[key][0])
        open_groups[key][1] += 1
    groups = numpy.frombuffer(group_of, numpy.int32)
    members = numpy.argsort(groups, kind="stable")
    ends = numpy.bincount(groups, minlength=count).cumsum()
    first = members[ends - numpy.diff(ends, prepend=0)]
    return Groups(IntegerLists(members, ends), numpy.array(source_of, numpy.int32)[first], list(numbers))
