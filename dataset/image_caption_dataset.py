"""Training samples and batches from records: photos, prompt, labels, packing. Called by `training/`.

Shared-image packing puts several questions on one photo into one sequence,

    [prefix + photo][question 1 + answer 1][question 2 + answer 2] …
    [prefix + photo + question][answer 1][answer 2] …                 several answers to one question

Each branch attends to the prefix and to itself, and its positions continue after the prefix (`qwen/attention.py`). Loss
and gradients therefore equal those of separate samples, but the photo's tokens pass the language model only once.
`collate` concatenates samples in one row without padding.

Shapes: T tokens, C crops of a photo, R rows of a crop, Dv encoder width.
"""

import itertools
import random
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset

from batch import Batch, sample_positions
from dataset.compact import compact
from dataset.grouping import group_entries
from dataset.records import Entry, Photo
from errors import UserError
from qwen.chat import IGNORE_INDEX, ChatFormat, Message, MessageFormat
from visual.web import WebError
from visual_plan import VisualPlan

REPLACEMENTS = 8  # other samples to try if a photo cannot be read


class BrokenPhotoError(UserError):
    """A photo cannot be read."""


class Rendered(NamedTuple):
    """Tokens of an entry; `photo_ids` are the photos of the turns that fit, in reading order."""

    input_ids: list[int]
    labels: list[int]
    photo_ids: tuple[int, ...]


@dataclass
class Sample:
    """One training sample: one entry or, with packing, several entries with a common prefix.

    Attributes:
        input_ids, labels: (T,) int64.
        lengths: tokens of the prefix and of each branch; with one entry, tokens of the sample.
        photo_ids: photo IDs in the order of their placeholders.
        photos: by ID, pixels (C, 3, H, W) float32 or features (C, R, Dv); empty before loading.
        replaced: an error message for each unreadable photo that this sample replaces.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    photo_ids: tuple[int, ...]
    photos: Mapping[int, torch.Tensor]
    replaced: tuple[str, ...] = ()


def entry_messages(
    entry: Entry, chat: MessageFormat, answers: Sequence[str], plans: Mapping[int, VisualPlan] | None = None
) -> list[Message]:
    """Return the dialogue of an entry with one answer per turn.

    Args:
        answers: the chosen answer of each turn. If there are fewer answers than turns, the dialogue ends with the next
            question.
        plans: plans of the photos, by ID; None: each photo is one crop.
    """
    messages = []
    for index, turn in enumerate(entry.turns[: len(answers) + 1]):
        photos = [chat.plan if plans is None else plans[ID] for ID in turn.images]
        messages.append(chat.question(turn.question, photos))
        if index < len(answers):
            messages.append(chat.answer(answers[index]))
    return messages


class ImageCaptionDataset(Dataset):
    """Data set of training samples.

    Args:
        photos: by ID, from 0 without gaps.
        entries: the records.
        chat: prompt format of the model.
        load_photo: photo and epoch → pixels (C, 3, H, W) float32 or cached features (C, R, Dv); raises UserError for an
            unreadable photo.
        plan_photo: photo → its plan, without decoding the photo; None: each photo is one crop.
        max_length: longest entry in tokens. A longer entry loses whole turns from the end, then the end of the answer.
        max_questions: most entries in one sequence; 1: no packing.
        seed: seed of the choice of answers, together with epoch and index.
        keep_apart: see `group_entries`.
        replace_broken: return another sample if a photo cannot be read.

    Attributes:
        groups: the entry numbers of each sample.
        entry_sources: names of the sources of all entries.
    """

    def __init__(
        self,
        photos: Mapping[int, Photo] | Sequence[Photo],
        entries: Sequence[Entry],
        chat: ChatFormat,
        load_photo: Callable[[Photo, int], torch.Tensor],
        plan_photo: Callable[[Photo], VisualPlan] | None = None,
        max_length: int = 2048,
        max_questions: int = 1,
        seed: int = 0,
        keep_apart: Callable[[str], Hashable] | None = None,
        replace_broken: bool = False,
    ) -> None:
        self.photos = compact([photos[ID] for ID in range(len(photos))]) if isinstance(photos, dict) else photos
        self.entries = compact(entries)
        self.chat = chat
        self.load_photo = load_photo
        self.plan_photo = plan_photo
        self.max_length = max_length
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes outlive an epoch
        self.groups, self._source_numbers, self.entry_sources = group_entries(
            entries, chat.prompt.image_first, max_questions, keep_apart
        )
        self.replace_broken = replace_broken

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the choice of answers and the augmentation."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.groups)

    def source(self, index: int) -> str:
        """Return the source of sample `index`, which is the source of its first entry."""
        return self.entry_sources[self._source_numbers[index]]

    def samples_by_source(self) -> "dict[str, array[int]]":
        """Return the sample indices of each source, in ascending order; the sources are sorted by name."""
        numbers = {self.entry_sources[number]: number for number in numpy.unique(self._source_numbers)}
        return {source: self._samples_of(numbers[source]) for source in sorted(numbers)}

    def _samples_of(self, source: int) -> "array[int]":
        return array("q", numpy.flatnonzero(self._source_numbers == source).tobytes())

    def __getitem__(self, index: int) -> Sample | str:
        """Return sample `index` with its photos.

        With `replace_broken`, an unreadable photo causes another sample, which lists the errors in `replaced`. If all
        candidates are unreadable, or the question is too long, the result is an error message. The training process
        raises it, because an exception in a worker would include the worker's traceback.
        """
        broken: list[str] = []
        for candidate in itertools.chain([index], self._replacements(index)):
            try:
                sample = self.tokens(candidate)
                sample.photos = {ID: self._of_photo(ID, self.load_photo) for ID in dict.fromkeys(sample.photo_ids)}
            except BrokenPhotoError as error:
                broken.append(str(error))
            except UserError as error:
                return str(error)
            else:
                sample.replaced = tuple(broken)
                return sample
        return broken[0]

    def _replacements(self, index: int) -> Iterator[int]:
        """Yield other samples of the same source; epoch and index determine them. Empty without `replace_broken`.

        Samples that are at most as long as sample `index` come first, then the others by length. The token budget was
        computed with the length of sample `index`.
        """
        if not self.replace_broken:
            return
        others = self._samples_of(self._source_numbers[index])
        others.remove(index)
        choose = random.Random(f"{self.seed} {int(self.epoch)} replacement {index}")
        drawn = choose.sample(others, min(REPLACEMENTS, len(others)))
        excess = {other: max(self.length(other) - self.length(index), 0) for other in drawn}
        yield from sorted(drawn, key=excess.__getitem__)

    def length(self, index: int) -> int:
        """Return the tokens of a sample; 0 without an answer: a photo cannot be read, or the question is too long."""
        try:
            return len(self.tokens(index).input_ids)
        except UserError:  # of a candidate, `__getitem__` finds it again
            return 0

    def _of_photo(self, ID: int, read: Callable[[Photo, int], Any]) -> Any:
        photo = self.photos[ID]
        try:
            return read(photo, int(self.epoch))
        except WebError:
            raise
        except UserError as error:
            raise BrokenPhotoError(photo.problem(error)) from error

    def tokens(self, index: int) -> Sample:
        """Return sample `index` without its photos.

        Raises:
            UserError: photo and first question exceed `max_length`; or, with tiles, the size of a photo cannot be read.
        """
        plans: dict[int, VisualPlan] = {}  # the entries of a sample show the same photo
        rendered = [self.render_entry(number, plans) for number in self.groups[index]]
        first = rendered[0]
        if len(rendered) == 1:
            input_ids, labels, lengths, photo_ids = (
                first.input_ids,
                first.labels,
                (len(first.input_ids),),
                first.photo_ids,
            )
        else:
            shared = self.entries[self.groups[index][0]].turns[0].images
            input_ids, labels, lengths = pack([(one.input_ids, one.labels) for one in rendered])
            photo_ids = shared + tuple(ID for one in rendered for ID in one.photo_ids[len(shared) :])
        return Sample(torch.tensor(input_ids), torch.tensor(labels), lengths, photo_ids, {})

    def plan(self, ID: int) -> VisualPlan:
        """Return the plan of photo `ID`; raise UserError if it needs the size of the photo and cannot read it."""
        if self.plan_photo is None:
            return self.chat.plan
        plan_photo = self.plan_photo
        return self._of_photo(ID, lambda photo, _: plan_photo(photo))

    def render_entry(self, number: int, plans: dict[int, VisualPlan] | None = None) -> Rendered:
        """Return the tokens of entry `number`, cut to `max_length`; errors as `tokens`.

        Args:
            plans: plans of photos that are known already, by ID; those of the entry are added.
        """
        entry = self.entries[number]
        choose = random.Random(f"{self.seed} {int(self.epoch)} {number}")  # equal in all workers
        answers = [choose.choice(turn.answers) for turn in entry.turns]
        plans = {} if plans is None else plans
        plans |= {ID: self.plan(ID) for ID in set(entry.images) - plans.keys()}
        turns, input_ids, labels = 0, [], []
        for turns in range(len(answers), 0, -1):
            messages = entry_messages(entry, self.chat, answers[:turns], plans)[: 2 * turns]
            input_ids, labels = self.chat.render(messages)
            if len(input_ids) <= self.max_length or turns == 1:
                break
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE_INDEX for label in labels):
            raise UserError(
                f"the question {entry.turns[0].question[:60]!r} of source '{entry.source}' fills 'data.max_length' "
                f"= {self.max_length} tokens (or the language model's context, if it is shorter), so no answer is left "
                "to learn: raise it, or give a photo fewer tokens (projector.kind=pixel_shuffle, smaller visual.tiles)"
            )
        shown = tuple(ID for turn in entry.turns[:turns] for ID in turn.images)
        return Rendered(input_ids, labels, shown)


def pack(samples: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Pack token sequences into one sequence, which contains their common prefix once.

    The prefix ends at the first token in which the sequences differ: behind the photo if the questions differ, behind
    the question if these are answers to the same one. It always ends before the last token of a question, because that
    token predicts the first one of the answer and each branch has its own answer.

    Args:
        samples: (input_ids, labels) of each question; the labels contain an answer.

    Returns:
        `input_ids` and `labels` (T,), and the lengths of the prefix and of each branch.
    """
    answers = [next(place for place, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in samples]
    columns = zip(*(ids[: min(answers) - 1] for ids, _ in samples), strict=True)
    prefix_length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    input_ids, labels, lengths = samples[0][0][:prefix_length], samples[0][1][:prefix_length], [prefix_length]
    for sample_ids, sample_labels in samples:
        input_ids += sample_ids[prefix_length:]
        labels += sample_labels[prefix_length:]
        lengths.append(len(sample_ids) - prefix_length)
    return input_ids, labels, tuple(lengths)


def collate(samples: Sequence[Sample | str]) -> Batch | str:
    """Concatenate samples in one row; the batch contains each distinct photo once.

    If a sample is an error message, return it.
    """
    sound: list[Sample] = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        # the token before a sample belongs to another sample, so it must not predict the first token of this one
        assert sample.labels[0] == IGNORE_INDEX, "the first token of a sample cannot be supervised"
        sound.append(sample)
    batch = Batch(
        input_ids=torch.cat([sample.input_ids for sample in sound]).unsqueeze(0),
        labels=torch.cat([sample.labels for sample in sound]).unsqueeze(0),
        position_ids=torch.cat([sample_positions(sample.lengths) for sample in sound]).unsqueeze(0),
        lengths=tuple(sample.lengths for sample in sound),
        replaced=tuple(sentence for sample in sound for sentence in sample.replaced),
    )
    distinct = {ID: crops for sample in sound for ID, crops in sample.photos.items()}
    if distinct:
        crops = torch.cat(list(distinct.values()))
        numbers = torch.arange(len(crops)).split([len(own) for own in distinct.values()])
        rows = dict(zip(distinct, numbers, strict=True))
        batch.crop_index = torch.cat([rows[ID] for sample in sound for ID in sample.photo_ids])
        if crops.ndim == 4:  # (C, 3, H, W) pixels; features are (C, R, Dv)
            batch.pixel_values = crops
        else:
            batch.image_features = crops
    return batch
