"""Alignment of a new projector with the words of the language model (`train.word_alignment`). Called by `build.py`.

A new projector first learns what improves every answer, the same for all photos, so that their tokens become nearly
equal (`benchmarks/word_alignment.py`). Here, before the first step, the tokens learn to resemble the word embeddings of
their photo's answers. Encoder features are computed once and the language model does not run, so a pass over the photos
takes a small part of the time of one in training.

It is multiple-instance learning, as in Fang et al. 2015 (arXiv 1411.4952): a word belongs to a photo if one of its
tokens shows it. Shapes: P photos, T image tokens of a photo, V words, Dl width of the language model.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from dataset.records import Entry, Photo
from errors import UserError
from model.model import MMultiModal
from training.feature_cache import PixelLoader, encoded_photos

FEWEST_PHOTOS = 8  # that have a word; of rarer ones, there are too few examples
SMALLEST_SHARE = 1 / 8  # in place of it, for data sets of less than 64 photos
LARGEST_SHARE = 0.5  # of the photos: a word of more of them, such as "a", says little about a photo
FEATURE_BYTES = 4 << 30  # of features in memory; of more photos, a random part is used
PHOTOS_OF_A_STEP = 64
NUMBERS_OF_A_STEP = 1 << 26  # similarities of a step at most, 256 MiB in float32: fewer photos if they have many tokens
# The values below served Flickr8k with ViT-Tiny and SmolLM2-135M; others were hardly tried.
LEARNING_RATE = 1e-3
SCORE_LEARNING_RATE = 1e-2
DROPOUT = 0.2  # of the features, so that the projector does not learn the photos by heart
FIRST_SCALE = 8.0  # of cosines, which are between -1 and 1
NORM_WEIGHT = 10.0  # of the squared difference in log length, beside a loss that is summed over all words


class WordScores(nn.Module):
    """How much a photo shows each word: a soft maximum over its tokens of their cosine similarity to the word.

    Args:
        vectors: (V, Dl) word embeddings. Their mean is taken off, which is common to all words.
        shares: (V,) share of the photos that have the word: the score of a photo without any similarity.
    """

    def __init__(self, vectors: torch.Tensor, shares: torch.Tensor) -> None:
        super().__init__()
        self.words = functional.normalize(vectors - vectors.mean(0), dim=1)
        self.bias = nn.Parameter(shares.logit())
        self.scale = nn.Parameter(torch.tensor(FIRST_SCALE, device=vectors.device))

    def forward(self, photos: Sequence[torch.Tensor]) -> torch.Tensor:
        """(T, Dl) tokens of each of P photos → (P, V) logits."""
        similarities = functional.normalize(torch.cat(list(photos)), dim=1) @ self.words.T * self.scale
        maxima = [
            own.logsumexp(0) - math.log(len(own)) for own in similarities.split([len(tokens) for tokens in photos])
        ]
        return torch.stack(maxima) + self.bias


def words_of_photos(model: MMultiModal, entries: Iterable[Entry], IDs: Iterable[int]) -> dict[int, set[int]]:
    """Photo → token ids of all answers about it; entries with several photos do not say which one shows a word."""
    words: dict[int, set[int]] = {ID: set() for ID in IDs}
    for entry in entries:
        if len(entry.images) == 1 and entry.images[0] in words:
            for answer in (answer for turn in entry.turns for answer in turn.answers):
                words[entry.images[0]].update(model.processor.chat.encode_text(answer))
    return words


def telling_words(words: Mapping[int, set[int]]) -> list[int]:
    """Token ids, ascending, that are in the answers of enough photos, but not of too many."""
    counts = Counter(token for own in words.values() for token in own)
    fewest, most = min(FEWEST_PHOTOS, SMALLEST_SHARE * len(words)), LARGEST_SHARE * len(words)
    return sorted(token for token, count in counts.items() if fewest <= count <= most)


def choose_photos(model: MMultiModal, photos: Mapping[int, Photo], entries: Iterable[Entry], seed: int) -> list[Photo]:
    """Photos of the entries with one photo, in random order, as many as `FEATURE_BYTES` hold the features of."""
    IDs = sorted({entry.images[0] for entry in entries if len(entry.images) == 1})
    plan = PixelLoader(model.processor).plan
    crop_bytes = 2 * model.encoder.grid.rows * model.encoder.width
    chosen, room = [], FEATURE_BYTES
    for number in torch.randperm(len(IDs), generator=torch.Generator().manual_seed(seed)).tolist():
        photo = photos[IDs[number]]
        with contextlib.suppress(UserError):  # its size cannot be read: it is left out with the unreadable ones
            room -= plan(photo).crops * crop_bytes
        if room < 0:
            break
        chosen.append(photo)
    return chosen


def align_words(
    model: MMultiModal, photos: Mapping[int, Photo], entries: Sequence[Entry], passes: int, seed: int, workers: int
) -> str:
    """Train the projector alone for `passes` passes over the photos; return a sentence that says what was done.

    Its tokens get the mean length of the word embeddings. Unreadable photos are left out; the global random state and
    the choice of trained parts stay as they are.

    Args:
        photos: by ID.
        entries: for training.
        workers: processes that read photos.
    """
    began = time.monotonic()
    chosen = choose_photos(model, photos, entries, seed)
    words = words_of_photos(model, entries, (photo.ID for photo in chosen))
    vocabulary = telling_words(words)
    column = {token: number for number, token in enumerate(vocabulary)}
    features, targets = [], []
    model.eval()
    with torch.no_grad():
        for photo, own in zip(chosen, encoded_photos(model, chosen, workers), strict=True):
            if isinstance(own, torch.Tensor):
                features.append(own)
                own_words = [column[token] for token in words[photo.ID] if token in column]
                targets.append(torch.tensor(own_words, dtype=torch.long))  # for some photos, there is none
    if not vocabulary or not features:
        return (
            "train.word_alignment: the projector stays as it is, because no word is in the answers of enough photos "
            f"without being in those of most ({len(features):,} readable photos with questions of their own)"
        )
    losses = _train(model, features, targets, vocabulary, passes, seed)
    return (
        f"train.word_alignment: {passes} passes over {len(features):,} photos and {len(vocabulary):,} words in "
        f"{time.monotonic() - began:.0f} s, loss {losses[0]:.4g} in the first and {losses[-1]:.4g} in the last"
    )


def _train(
    model: MMultiModal,
    features: list[torch.Tensor],
    targets: list[torch.Tensor],
    vocabulary: list[int],
    passes: int,
    seed: int,
) -> list[float]:
    """Return the mean loss of a photo in each pass.

    Args:
        features: (C, R, Dv) of each photo.
        targets: numbers in `vocabulary` of each photo's words.
    """
    device, projector = model.device, model.feature_proj
    vectors = model.LLM.get_input_embeddings().weight.detach()[vocabulary].float().to(device)
    shares = torch.bincount(torch.cat(targets), minlength=len(vocabulary)) / len(features)
    scores = WordScores(vectors, shares.clamp(1e-4, 1 - 1e-4).to(device))
    length = vectors.norm(dim=1).log().mean()
    needed = {name: parameter.requires_grad for name, parameter in projector.named_parameters()}
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(projector.parameters()), "lr": LEARNING_RATE},
            {"params": list(scores.parameters()), "lr": SCORE_LEARNING_RATE, "weight_decay": 0.0},
        ]
    )
    most_tokens = max(len(own) for own in features) * model.processor.chat.plan.crop_tokens
    size = max(1, min(PHOTOS_OF_A_STEP, NUMBERS_OF_A_STEP // (most_tokens * len(vocabulary))))
    steps = passes * math.ceil(len(features) / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    with tqdm(total=steps, desc="aligning with words", unit="step", dynamic_ncols=True) as bar:
        for _ in range(passes):
            total = 0.0
            for batch in torch.randperm(len(features), generator=generator).split(size):
                rows = torch.cat([features[number] for number in batch]).to(device, torch.float32)
                kept = torch.rand(rows.shape, generator=generator).to(device) >= DROPOUT
                tokens = model.project(rows * kept / (1 - DROPOUT)).float()  # (crops, M, Dl)
                crops = [len(features[number]) for number in batch]
                wanted = torch.zeros(len(batch), len(vocabulary))
                for row, number in enumerate(batch):
                    wanted[row, targets[number]] = 1.0
                logits = scores([own.flatten(0, 1) for own in tokens.split(crops)])
                loss = functional.binary_cross_entropy_with_logits(logits, wanted.to(device), reduction="sum")
                norms = tokens.norm(dim=-1).clamp_min(1e-6).log()
                (loss / len(batch) + NORM_WEIGHT * (norms - length).square().mean()).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item()
                bar.update()
            losses.append(total / len(features))
    for name, parameter in projector.named_parameters():
        parameter.requires_grad_(needed[name])
    return losses
