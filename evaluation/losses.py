"""Loss of the true answers: how likely the model finds them, word by word, if it is told all before each word.

The sequences are those of training (`ImageCaptionDataset`), with every reference of a question and with its own photo.
Of a dialogue, only the last answer counts, because each turn is a question of its own here.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo
from errors import UserError
from evaluation.runner import Progress, Question
from model.model import MMultiModal
from qwen.chat import IGNORE_INDEX
from visual.photo import load_image

MOST_REFERENCES = 16  # in one sequence, behind the same photo
RECENT_PHOTOS = 4  # whose features are kept: a photo with more references has several sequences


class Loss(NamedTuple):
    """Summed loss of answers, and their tokens with the end token of each."""

    summed: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Per token, in nats."""
        return self.summed / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700.0))  # e^710 is beyond a float


@torch.no_grad()
def answer_losses(
    model: MMultiModal, questions: list[Question], photos: Mapping[int, Photo], progress: Progress = iter
) -> dict[tuple[str, str], Loss]:
    """Question type and source → loss of the references of such questions.

    Args:
        model: in eval mode.
        photos: by ID.

    Raises:
        UserError: an unreadable photo.
    """
    entries = [one for question in questions for one in _references(question)]

    @functools.lru_cache(RECENT_PHOTOS)
    def features(photo: Photo, epoch: int) -> torch.Tensor:
        image = load_image(photo.picture)
        pixels = model.processor.pixels(image, model.processor.plan(*image.size))
        return model.encode_image(pixels.to(model.device))  # (C, R, Dv)

    dataset = ImageCaptionDataset(
        photos,
        entries,
        model.processor.chat,
        features,
        lambda photo: model.processor.plan_of_file(photo.picture),
        max_length=model.language_model.longest_packed,
        max_questions=MOST_REFERENCES,
    )
    losses: dict[tuple[str, str], Loss] = {}
    for index in progress(list(range(len(dataset)))):
        sample = dataset[index]
        if isinstance(sample, str):
            raise UserError(sample)
        group = dataset.groups[index]
        counts = _keep_last_answers(sample.labels, sample.lengths)[-len(group) :]  # nothing of a prefix is supervised
        batch = collate([sample])
        assert not isinstance(batch, str)
        for number, own in zip(group, model.token_losses(batch.to(model.device)).split(counts), strict=True):
            kind = (entries[number].type, entries[number].source)
            summed, tokens = losses.get(kind, Loss())
            losses[kind] = Loss(summed + own.sum().item(), tokens + len(own))
    return losses


def _references(question: Question) -> list[Entry]:
    """The question once with each of its references, after the first answers of earlier turns."""
    source = question.entry.source
    *earlier, last = question.entry.turns[: question.turn + 1]
    before = tuple(replace(turn, answers=turn.answers[:1]) for turn in earlier)
    return [Entry(source, question.type, (*before, replace(last, answers=(text,)))) for text in last.answers]


def _keep_last_answers(labels: torch.Tensor, lengths: tuple[int, ...]) -> list[int]:
    """Take the supervision from all but the last answer of each segment; return how many tokens of each have it.

    Args:
        labels: (T,), changed in place.
    """
    segments = labels.split(lengths)
    for segment in segments:
        supervised = (segment != IGNORE_INDEX).nonzero().flatten()
        gaps = (supervised.diff() > 1).nonzero().flatten()  # between two answers
        if len(gaps):
            segment[: supervised[gaps[-1] + 1]] = IGNORE_INDEX
    return [int((segment != IGNORE_INDEX).sum()) for segment in segments]
