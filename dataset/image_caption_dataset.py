"""Records to training samples and batches: photo, prompt, labels. Called by `training/loop.py`.

One sample is one photo with one of its questions, or, with packing, with all questions that share the tokens up to the
photo (`dataset/packing.py`).

Shapes: B samples, K photos of a sample, T tokens, N image tokens of a photo, Dv encoder width.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from config import IMAGE_TAG
from dataset.packing import pack
from dataset.records import Entry, Photo
from errors import UserError
from qwen.attention import PackedLayout
from qwen.chat import IGNORE_INDEX, ChatFormat, Message


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
        photos: by ID.
        entries: the records to learn from.
        chat: prompt format of the model.
        load_photo: photo → pixels (3, H, W) float32, or its cached features (N, Dv); UserError for a broken photo.
        photo_key: name of what `load_photo` gives, `pixel_values` or `image_features`.
        max_length: longest dialogue in tokens; longer ones lose whole turns from the end, then the end of the answer.
        max_questions: how many questions of a photo ride in one sequence; 1: no packing.
        seed: of the choice among several accepted answers, together with epoch and index.

    """

    def __init__(
        self,
        photos: dict[int, Photo],
        entries: list[Entry],
        chat: ChatFormat,
        load_photo: Callable[[Photo], torch.Tensor],
        photo_key: str = "pixel_values",
        max_length: int = 2048,
        max_questions: int = 1,
        seed: int = 0,
    ) -> None:
        self.photos = photos
        self.entries = entries
        self.chat = chat
        self.load_photo = load_photo
        self.photo_key = photo_key
        self.max_length = max_length
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes outlive an epoch
        self.groups = group_entries(entries, chat.prompt.image_first, max_questions)

    def set_epoch(self, epoch: int) -> None:
        """Choose anew among accepted answers."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (3, H, W) ((K, 3, H, W) for several photos, absent without) or `image_features` likewise,
        `photo_ids` with the K IDs, and what `tokens` gives.

        A photo that cannot be read, or a dialogue too long, gives `{"error": sentence}`, for the training process to
        raise; out of a worker it would come wrapped in a traceback.
        """
        group = self.groups[index]
        entry = self.entries[group[0]]
        try:
            loaded = [self.load_photo(self.photos[ID]) for ID in entry.images]
            sample = self.tokens(index)
        except UserError as error:
            return {"error": str(error)}
        if loaded:
            sample[self.photo_key] = loaded[0] if len(loaded) == 1 else torch.stack(loaded)
            sample["photo_ids"] = entry.images
        return sample

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


def group_entries(entries: list[Entry], image_first: bool, max_questions: int) -> list[list[int]]:
    """Indices of entries that can share one sequence: same photos, same text before the last of them.

    Text-only entries stay alone: there is no photo whose cost they could share.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple, list[int]] = {}
    for number, entry in enumerate(entries):
        if not entry.images:
            groups.append([number])
            continue
        before = () if image_first else tuple(entry.turns[0].question.split(IMAGE_TAG, len(entry.images))[:-1])
        key = (entry.images, before)
        if key not in open_groups or len(open_groups[key]) >= max_questions:
            open_groups[key] = []
            groups.append(open_groups[key])
        open_groups[key].append(number)
    return groups


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples to a batch: one row in which they lie behind one another, without padding.

    Returns:
        `input_ids`, `labels` and `position_ids` (1, T) int64; `layout`, what stands where in the row; and unless all
        samples are text only, `pixel_values` (B_img, 3, H, W) or `image_features` (B_img, N, Dv), each distinct photo
        once, and `photo_index` (placeholders' photos,) int64, which of them stands where, in reading order. If a photo
        was broken: `{"error": sentence}` alone.
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
    return batch
