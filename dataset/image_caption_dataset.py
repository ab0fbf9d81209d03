"""Records to training samples and batches: photo, prompt, labels. Called by `training/loop.py`.

One sample is one photo with one of its questions, or, with packing, with all questions that share the tokens up to the
photo (`dataset/packing.py`).

Shapes: B samples, K photos of a sample, T tokens, N image tokens of a photo, Dv encoder width.
"""

import itertools
import pickle
import random
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from config import IMAGE_TAG
from dataset.packing import pack
from dataset.records import Entry, Photo
from errors import UserError
from qwen.attention import PackedLayout
from qwen.chat import IGNORE_INDEX, ChatFormat, Message

REPLACEMENTS = 8  # other samples tried in place of one whose photo cannot be read


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


def entry_messages(entry: Entry, chat: ChatFormat, answers: list[str]) -> list[Message]:
    """The dialogue of an entry, with one of the accepted answers per turn.

    Args:
        answers: the chosen answer of each turn; one fewer than there are turns leaves the last question open.
    """
    messages = []
    for index, turn in enumerate(entry.turns[: len(answers) + 1]):
        messages.append(chat.question(turn.question, len(entry.images) if index == 0 else 0))
        if index < len(answers):
            messages.append(chat.answer(answers[index]))
    return messages


class ImageCaptionDataset(Dataset):
    """Samples of photos and dialogues.

    Args:
        photos: by ID, from 0 without gaps.
        entries: the records to learn from.
        chat: prompt format of the model.
        load_photo: photo → pixels (3, H, W) float32, or its cached features (N, Dv); UserError for a broken photo.
        photo_key: name of what `load_photo` gives, `pixel_values` or `image_features`.
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
        load_photo: Callable[[Photo], torch.Tensor],
        photo_key: str = "pixel_values",
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
        self.photo_key = photo_key
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (3, H, W) ((K, 3, H, W) for several photos, absent without) or `image_features` likewise,
        `photo_ids` with the K IDs, and what `tokens` gives.

        Where a photo cannot be read and `replace_broken` is on, this is another sample, and `replaced` lists a sentence
        for each photo that was given up. If all are broken, or the dialogue is too long, it is `{"error": sentence}`,
        which the training process raises: an error raised in a worker would arrive with a traceback.
        """
        broken: list[str] = []
        try:
            sample = self._sample(index, broken)
            if sample is None and self.replace_broken:
                others = (self._sample(other, broken) for other in self._replacements(index))
                sample = next((other for other in others if other is not None), None)
        except UserError as error:
            return {"error": str(error)}
        if sample is None:
            return {"error": broken[0]}
        return sample | ({"replaced": broken} if broken else {})

    def _sample(self, index: int, broken: list[str]) -> dict[str, Any] | None:
        """A sample; None where one of its photos cannot be read, which appends the sentence to `broken`."""
        images = self.entries[self.groups[index][0]].images
        try:
            photos = [self.load_photo(self.photos[ID]) for ID in images]
        except UserError as error:
            broken.append(str(error))
            return None
        sample = self.tokens(index)
        if photos:
            sample[self.photo_key] = photos[0] if len(photos) == 1 else torch.stack(photos)
            sample["photo_ids"] = images
        return sample

    def _replacements(self, index: int) -> list[int]:
        """Other samples of the same source, the same ones for an epoch and index. Those no longer than sample `index`
        come first, then the shortest: a token budget counted on its length."""
        numbers = (self._source_numbers == self._source_numbers[index]).nonzero().flatten().tolist()
        others = [number for number in numbers if number != index]
        choose = random.Random(f"{self.seed} {int(self.epoch)} replacement {index}")
        drawn = choose.sample(others, min(REPLACEMENTS, len(others)))
        length = len(self.tokens(index)["input_ids"])
        return sorted(drawn, key=lambda other: max(len(self.tokens(other)["input_ids"]) - length, 0))

    def tokens(self, index: int) -> dict[str, Any]:
        """The text side of a sample, without its photo: `input_ids` and `labels` (T,) int64, and `lengths`, those of
        the shared prefix and of each question behind it; of the whole where there is one question.

        Raises:
            UserError: photo and first question alone exceed `max_length`.
        """
        rendered = [self.render_entry(number) for number in self.groups[index]]
        if len(rendered) > 1:
            ids = rendered[0][0]
            prefix_length = len(ids) - ids[::-1].index(self.chat.image_token_id)
            input_ids, labels, lengths = pack(rendered, prefix_length)
        else:
            input_ids, labels = rendered[0]
            lengths = (len(input_ids),)
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "lengths": lengths}

    def render_entry(self, number: int) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of entry `number` by itself, cut to `max_length`; errors as `tokens`."""
        entry = self.entries[number]
        choose = random.Random(f"{self.seed} {int(self.epoch)} {number}")  # the same whichever worker draws it
        answers = [choose.choice(turn.answers) for turn in entry.turns]
        for turns in range(len(answers), 0, -1):
            input_ids, labels = self.chat.render(entry_messages(entry, self.chat, answers[:turns])[: 2 * turns])
            if len(input_ids) <= self.max_length or turns == 1:
                break
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE_INDEX for label in labels):
            raise UserError(
                f"the question {entry.turns[0].question[:60]!r} of source '{entry.source}' fills 'data.max_length' "
                f"= {self.max_length} tokens, so no answer is left to learn: raise it"
            )
        return input_ids, labels


def group_entries(
    entries: Sequence[Entry],
    image_first: bool,
    max_questions: int,
    keep_apart: Mapping[str, Hashable] | None = None,
) -> list[list[int]]:
    """Indices of entries that can share one sequence: same photos, same text before the last of them.

    Text-only entries stay alone: there is no photo whose cost they could share.

    Args:
        keep_apart: a value for each source; entries of sources with different values share no sequence.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple, list[int]] = {}
    for number, entry in enumerate(entries):
        if not entry.images:
            groups.append([number])
            continue
        before = () if image_first else tuple(entry.turns[0].question.split(IMAGE_TAG, len(entry.images))[:-1])
        key = (entry.images, before, None if keep_apart is None else keep_apart[entry.source])
        if key not in open_groups or len(open_groups[key]) >= max_questions:
            open_groups[key] = []
            groups.append(open_groups[key])
        open_groups[key].append(number)
    return groups


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples into a batch: one row in which they follow one another, without padding.

    Returns:
        `input_ids`, `labels` and `position_ids` (1, T) int64; `layout`, the parts of the row; and unless all
        samples are text only, `pixel_values` (B_img, 3, H, W) or `image_features` (B_img, N, Dv), each distinct photo
        once, and `photo_index` (placeholders' photos,) int64, the one at each place, in reading order; `replaced`,
        a sentence for each photo that could not be read, where samples were replaced. If a sample is an error:
        `{"error": sentence}` alone.
    """
    for sample in samples:
        if "error" in sample:
            return {"error": sample["error"]}
        # the token before a sample in the row is not its predecessor
        assert sample["labels"][0] == IGNORE_INDEX, "the first token of a sample cannot be supervised"
    layout = PackedLayout(tuple(sample["lengths"] for sample in samples))
    batch: dict[str, Any] = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples]).unsqueeze(0),
        "labels": torch.cat([sample["labels"] for sample in samples]).unsqueeze(0),
        "position_ids": layout.positions(),
        "layout": layout,
    }
    for key, dims in (("pixel_values", 3), ("image_features", 2)):
        shown = [
            (ID, photo)
            for sample in samples
            if key in sample
            for ID, photo in zip(sample["photo_ids"], sample[key].reshape(-1, *sample[key].shape[-dims:]), strict=True)
        ]
        if shown:
            distinct = dict(shown)
            rows = {ID: row for row, ID in enumerate(distinct)}
            batch[key] = torch.stack(list(distinct.values()))
            batch["photo_index"] = torch.tensor([rows[ID] for ID, _ in shown])
    replaced = [sentence for sample in samples for sentence in sample.get("replaced", ())]
    return batch | ({"replaced": replaced} if replaced else {})
