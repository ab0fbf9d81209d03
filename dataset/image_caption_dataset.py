"""Records to training samples and batches: photos, prompt, labels, packing. Called by `training/`.

Shared-image packing puts several questions on one photo into one sequence,

    [prefix + photo][question 1 + answer 1][question 2 + answer 2] …

Every branch sees the prefix and itself, and its positions continue where the prefix ends (`qwen/attention.py`), so loss
and gradients equal those of the separate samples while the photo's tokens pass the language model once. `collate` lets
samples follow one another in one row, without padding.

Shapes: T tokens, C crops of a photo, R rows of a crop, Dv encoder width.
"""

import itertools
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from batch import Batch, sample_positions
from config import IMAGE_TAG
from dataset.compact import CompactList
from dataset.records import Entry, Photo
from errors import UserError
from qwen.chat import IGNORE_INDEX, ChatFormat, Message
from visual_plan import VisualPlan

REPLACEMENTS = 8  # other samples tried in place of one whose photo cannot be read


class BrokenPhotoError(UserError):
    """A photo cannot be read."""


class Rendered(NamedTuple):
    """An entry as tokens; `photo_ids` are those of the turns that were not cut off, in reading order."""

    input_ids: list[int]
    labels: list[int]
    photo_ids: tuple[int, ...]


@dataclass
class Sample:
    """One photo with one of its questions, or, packed, with all that share the tokens up to the photo.

    Attributes:
        input_ids, labels: (T,) int64.
        lengths: of the shared prefix and of each question behind it; of the whole where there is one question.
        photo_ids: of the photos in reading order of their placeholders.
        photos: by ID, pixels (C, 3, H, W) float32 or features (C, R, Dv); empty before they are loaded.
        replaced: a sentence for each photo that could not be read and was given up.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    photo_ids: tuple[int, ...]
    photos: Mapping[int, torch.Tensor]
    replaced: tuple[str, ...] = ()


def entry_messages(
    entry: Entry, chat: ChatFormat, answers: Sequence[str], plans: Mapping[int, VisualPlan] | None = None
) -> list[Message]:
    """The dialogue of an entry, with one of the accepted answers per turn.

    Args:
        answers: the chosen answer of each turn; one fewer than there are turns leaves the last question open.
        plans: of its photos, by ID; None: each is one crop.
    """
    messages = []
    for index, turn in enumerate(entry.turns[: len(answers) + 1]):
        photos = [chat.plan if plans is None else plans[ID] for ID in turn.images]
        messages.append(chat.question(turn.question, photos))
        if index < len(answers):
            messages.append(chat.answer(answers[index]))
    return messages


class ImageCaptionDataset(Dataset):
    """Samples of photos and dialogues.

    Args:
        photos: by ID, from 0 without gaps.
        entries: the records to learn from.
        chat: prompt format of the model.
        load_photo: photo and epoch → pixels (C, 3, H, W) float32 or cached features (C, R, Dv); UserError for a broken
            photo.
        plan_photo: photo → its plan, without decoding it; None: each photo is one crop.
        max_length: longest dialogue in tokens; longer ones lose whole turns from the end, then the end of the answer.
        max_questions: most questions of a photo in one sequence; 1: no packing.
        seed: of the choice among several accepted answers, together with epoch and index.
        keep_apart: see `group_entries`.
        replace_broken: draw another sample where a photo cannot be read.

    Attributes:
        groups: the numbers of the entries of each sample.
        sources: names of the sources; `source(index)` is that of a sample.
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
        keep_apart: Mapping[str, Hashable] | None = None,
        replace_broken: bool = False,
    ) -> None:
        by_ID = photos if isinstance(photos, CompactList) else CompactList(photos[ID] for ID in range(len(photos)))
        self.photos = by_ID
        self.entries = entries if isinstance(entries, CompactList) else CompactList(entries)
        self.chat = chat
        self.load_photo = load_photo
        self.plan_photo = plan_photo
        self.max_length = max_length
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes outlive an epoch
        groups = group_entries(entries, chat.prompt.image_first, max_questions, keep_apart)
        self.groups = CompactList(groups)
        by_group = [entries[group[0]].source for group in groups]
        self.sources = sorted(set(by_group))
        number_of = {source: number for number, source in enumerate(self.sources)}
        self._source_numbers = torch.tensor([number_of[source] for source in by_group], dtype=torch.int64)
        self.replace_broken = replace_broken

    def set_epoch(self, epoch: int) -> None:
        """Choose anew among accepted answers."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.groups)

    def source(self, index: int) -> str:
        """Source of sample `index`: that of its first question."""
        return self.sources[int(self._source_numbers[index])]

    def samples_by_source(self) -> dict[str, list[int]]:
        """Indices of the samples of each source, in rising order."""
        return {
            source: (self._source_numbers == number).nonzero().flatten().tolist()
            for number, source in enumerate(self.sources)
        }

    def __getitem__(self, index: int) -> Sample | str:
        """Sample `index` with its photos.

        Where a photo cannot be read and `replace_broken` is on, this is another sample that lists in `replaced` what
        was given up. If all are broken, or the dialogue is too long, it is a sentence, which the training process
        raises: an error raised in a worker would arrive with a traceback.
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
        """Other samples of the same source, the same ones for an epoch and index; none without `replace_broken`.

        Those no longer than sample `index` come first, then the shortest: a token budget counted on its length.
        """
        if not self.replace_broken:
            return
        numbers = (self._source_numbers == self._source_numbers[index]).nonzero().flatten().tolist()
        others = [number for number in numbers if number != index]
        choose = random.Random(f"{self.seed} {int(self.epoch)} replacement {index}")
        drawn = choose.sample(others, min(REPLACEMENTS, len(others)))
        excess = {other: max(self._length(other) - self._length(index), 0) for other in drawn}
        yield from sorted(drawn, key=excess.__getitem__)

    def _length(self, index: int) -> int:
        """Tokens of a sample; 0 where the size of one of its photos cannot be read."""
        try:
            return len(self.tokens(index).input_ids)
        except BrokenPhotoError:
            return 0

    def _of_photo(self, ID: int, read: Callable[[Photo, int], Any]) -> Any:
        try:
            return read(self.photos[ID], int(self.epoch))
        except UserError as error:
            raise BrokenPhotoError(str(error)) from error

    def tokens(self, index: int) -> Sample:
        """Sample `index` before its photos are loaded.

        Raises:
            UserError: photo and first question alone exceed `max_length`, or, with tiles, the size of a photo cannot be
                read.
        """
        rendered = [self.render_entry(number) for number in self.groups[index]]
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
            placeholders = sum(self.plan(ID).tokens for ID in shared)
            places = (place for place, token in enumerate(first.input_ids) if token == self.chat.image_token_id)
            prefix_length = next(itertools.islice(places, placeholders - 1, None)) + 1
            input_ids, labels, lengths = pack([(one.input_ids, one.labels) for one in rendered], prefix_length)
            photo_ids = shared + tuple(ID for one in rendered for ID in one.photo_ids[len(shared) :])
        return Sample(torch.tensor(input_ids), torch.tensor(labels), lengths, photo_ids, {})

    def plan(self, ID: int) -> VisualPlan:
        """What photo `ID` becomes; UserError where that depends on its size, which cannot be read."""
        if self.plan_photo is None:
            return self.chat.plan
        plan_photo = self.plan_photo
        return self._of_photo(ID, lambda photo, _: plan_photo(photo))

    def render_entry(self, number: int) -> Rendered:
        """Entry `number` by itself, cut to `max_length`; errors as `tokens`."""
        entry = self.entries[number]
        choose = random.Random(f"{self.seed} {int(self.epoch)} {number}")  # the same whichever worker draws it
        answers = [choose.choice(turn.answers) for turn in entry.turns]
        plans = {ID: self.plan(ID) for ID in set(entry.images)}
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
                f"= {self.max_length} tokens, so no answer is left to learn: raise it"
            )
        shown = tuple(ID for turn in entry.turns[:turns] for ID in turn.images)
        return Rendered(input_ids, labels, shown)


def group_entries(
    entries: Sequence[Entry],
    image_first: bool,
    max_questions: int,
    keep_apart: Mapping[str, Hashable] | None = None,
) -> list[list[int]]:
    """Indices of entries that can share one sequence: same photos in the first turn, same text before the last of them.

    Entries without a photo in their first turn stay alone: there is no photo whose cost they could share.

    Args:
        keep_apart: a value for each source; entries of sources with different values share no sequence.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple, list[int]] = {}
    for number, entry in enumerate(entries):
        images = entry.turns[0].images
        if not images:
            groups.append([number])
            continue
        before = () if image_first else tuple(entry.turns[0].question.split(IMAGE_TAG, len(images))[:-1])
        key = (images, before, None if keep_apart is None else keep_apart[entry.source])
        if key not in open_groups or len(open_groups[key]) >= max_questions:
            open_groups[key] = []
            groups.append(open_groups[key])
        open_groups[key].append(number)
    return groups


def pack(
    samples: list[tuple[list[int], list[int]]], prefix_length: int
) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Lay samples with a common prefix out as one sequence.

    Args:
        samples: (input_ids, labels) of each question; the first `prefix_length` ids are the same in all.
        prefix_length: up to and including the last shared photo token.

    Returns:
        `input_ids` and `labels` (T,), and the lengths of the prefix and of each branch.
    """
    prefix = samples[0][0][:prefix_length]
    input_ids, labels, lengths = list(prefix), samples[0][1][:prefix_length], [prefix_length]
    for sample_ids, sample_labels in samples:
        assert sample_ids[:prefix_length] == prefix, "packed samples must share their prefix"
        # the token before a branch in the sequence is not its predecessor, so it must not be asked to predict it
        assert sample_labels[prefix_length] == IGNORE_INDEX, "the first token of a branch cannot be supervised"
        input_ids += sample_ids[prefix_length:]
        labels += sample_labels[prefix_length:]
        lengths.append(len(sample_ids) - prefix_length)
    return input_ids, labels, tuple(lengths)


def collate(samples: Sequence[Sample | str]) -> Batch | str:
    """Let samples follow one another in one row; each distinct photo of theirs is in the batch once.

    If one of them is a sentence, so is the result.
    """
    sound: list[Sample] = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        # the token before a sample in the row is not its predecessor
        assert sample.labels[0] == IGNORE_INDEX, "the first token of a sample cannot be supervised"
        sound.append(sample)
    batch = Batch(
        input_ids=torch.cat([sample.input_ids for sample in sound]).unsqueeze(0),
        labels=torch.cat([sample.labels for sample in sound]).unsqueeze(0),
        position_ids=torch.cat([sample_positions(sample.lengths) for sample in sound]).unsqueeze(0),
        samples=tuple(sample.lengths for sample in sound),
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
