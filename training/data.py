"""From the config to training and validation sets, and the order in which samples are drawn. Called by `loop.py`."""

import hashlib
import random
from collections.abc import Hashable

import torch
from torch.utils.data import DataLoader, Dataset

from config import Config
from dataset.image_caption_dataset import CompactList, ImageCaptionDataset
from dataset.records import Entry, Photo, read_records, split_entries
from errors import UserError, shortened
from model.model import MMultiModal
from paths import existing_path, resolve_path
from training.feature_cache import PixelLoader, cached_features
from visual.augment import Augment


def build_datasets(
    config: Config,
    model: MMultiModal,
    photos: dict[int, Photo],
    train: list[Entry],
    val: list[Entry],
    encode: bool = True,
) -> tuple[ImageCaptionDataset, ImageCaptionDataset]:
    """Training and validation set; encodes all photos first where `data.cache_features` is on.

    Args:
        encode: False: read the photos' pixels where there is no feature cache yet, for a dry run.

    Raises:
        UserError: a source whose weight draws none of its samples; what `cached_features` raises.
    """
    features = None
    if config.data.cache_features:
        if model.trains_encoder:
            raise UserError(
                "'data.cache_features' keeps what the encoder gave before training, but 'train.parts.vision' trains "
                "the encoder: set data.cache_features=false"
            )
        used = sorted({ID for entry in [*train, *val] for ID in entry.images})
        features = cached_features(model, [photos[ID] for ID in used], config, encode)
    pixels = PixelLoader(model.processor)
    augment = Augment(config.data.augment) if config.data.augment else None
    augmented = PixelLoader(model.processor, augment, config.data.seed)
    max_questions = config.train.max_questions if config.train.pack_questions else 1
    compact_photos = CompactList(photos[ID] for ID in range(len(photos)))

    def dataset(
        entries: list[Entry], keep_apart: dict[str, Hashable], replace_broken: bool, load_photo: PixelLoader
    ) -> ImageCaptionDataset:
        return ImageCaptionDataset(
            compact_photos,
            entries,
            model.processor.chat,
            load_photo if features is None else features,
            pixels.plan,
            config.data.max_length,
            max_questions,
            config.data.seed,
            keep_apart,
            replace_broken,
        )

    weights = source_weights(config, {entry.source for entry in [*train, *val]})
    train_set = dataset(train, {entry.source: weights.get(entry.source, 1.0) for entry in train}, True, augmented)
    epoch_order(train_set, weights, config.train.seed, 0)  # so that a wrong weight is an error before the first step
    # its loss is given by source; losses could not be compared if unreadable photos were replaced
    val_set = dataset(val, {entry.source: entry.source for entry in val}, False, pixels)
    return train_set, val_set


def source_weights(config: Config, prepared: set[str]) -> dict[str, float]:
    """`data.sources[].weight` by the source's name.

    Args:
        prepared: the sources of the entries.

    Raises:
        UserError: a weight is given to a source that has no entry, so that it would do nothing.
    """
    for source in config.data.sources:
        if source.weight != 1 and source.name not in prepared:
            raise UserError(
                f"'data.sources': source '{shortened(source.name)}' has weight {source.weight} but no entry in "
                f"{config.data.captions} (there: {shortened(', '.join(sorted(prepared)))}): correct its name, or run "
                "process_image.py again"
            )
    return {source.name: source.weight for source in config.data.sources}


def read_split(config: Config) -> tuple[dict[int, Photo], list[Entry], list[Entry]]:
    """Photos by ID, training entries, validation entries.

    Raises:
        UserError: the two files are missing or wrong, or nothing is left to train on.
    """
    for key in ("image_map", "captions"):
        file = resolve_path(getattr(config.data, key))
        if not file.is_file():
            raise UserError(f"'data.{key}': {file} not found: make it with python process_image.py --config FILE")
    photos, entries = read_records(
        existing_path(config.data.image_map, "data.image_map"), existing_path(config.data.captions, "data.captions")
    )
    train, val = split_entries(photos, entries, config.data.val_fraction)
    if not train:
        raise UserError(f"'data.captions': {config.data.captions} leaves no training sample (val: {len(val)})")
    return photos, train, val


def data_hash(config: Config) -> str:
    """Hash of both record files, for the checkpoint's provenance."""
    digest = hashlib.sha256()
    for path in (config.data.image_map, config.data.captions):
        digest.update(resolve_path(path).read_bytes())
    return digest.hexdigest()[:16]


def epoch_order(dataset: ImageCaptionDataset, weights: dict[str, float], seed: int, epoch: int) -> list[int]:
    """Sample indices of one epoch in random order.

    Args:
        weights: by source; 2.0 draws each sample of it twice, 0.5 half of them. Epochs draw independently, so the
            halves of two epochs overlap.

    Raises:
        UserError: there is no sample, or a weight is so small that it draws none of its source.
    """
    choose = random.Random(f"{seed} {epoch}")
    order = []
    for source, indices in dataset.samples_by_source().items():
        weight = weights.get(source, 1.0)
        drawn = indices * int(weight) + choose.sample(indices, round(len(indices) * (weight % 1)))
        if not drawn:
            raise UserError(
                f"'data.sources': weight {weight} of source '{source}' draws none of its {len(indices)} training "
                f"samples: set it to {1 / len(indices):.2g} or more, or leave the source out"
            )
        order += drawn
    if not order:
        raise UserError("'data.captions': there is no training sample, so an epoch is empty")
    choose.shuffle(order)
    return order


def validation_sample(dataset: ImageCaptionDataset, count: int, seed: int) -> list[int]:
    """Indices of at most `count` samples, in rising order, the same for a seed.

    Each source has its share of them (by Sainte-Laguë's method: the next place goes to the source with most samples
    for each of its places, the new one counted half), and at least one where `count` is enough for that.
    """
    choose = random.Random(f"{seed} validation")
    by_source = dataset.samples_by_source()
    places = dict.fromkeys(by_source, int(count >= len(by_source)))
    while sum(places.values()) < min(count, len(dataset)):
        first = max(by_source, key=lambda source: len(by_source[source]) / (2 * places[source] + 1))
        places[first] += 1
    return sorted(index for source, indices in by_source.items() for index in choose.sample(indices, places[source]))


class _Lengths(Dataset):
    def __init__(self, dataset: ImageCaptionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        try:
            return len(self.dataset.tokens(index).input_ids)
        except UserError:  # training reports it when it comes to this sample
            return 0


def sample_lengths(dataset: ImageCaptionDataset, workers: int) -> list[int]:
    """Tokens of every sample with the answers of the dataset's epoch, photos not loaded.

    That takes 0.5 ms for a caption and 0.8 ms for a long answer: with the report's 310,000 rows and four workers about
    45 s at the start of each epoch, which then runs for hours.
    """
    loader = DataLoader(
        _Lengths(dataset), batch_size=1024, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    return [length for batch in loader for length in batch]


def micro_batches(
    order: list[int],
    size: int,
    processes: int,
    lengths: list[int] | None = None,
    tokens: int | None = None,
    start: int = 0,
) -> list[list[int]]:
    """Cut `order[start:]` into micro-batches, as many as all processes can share; at most `processes - 1` are left out.

    Started at the end of a step (`start` samples on), it gives the same micro-batches as the rest of a whole cut.

    Args:
        order: sample indices of a whole epoch.
        size: samples of a micro-batch, unless there is a token budget.
        lengths: tokens of each sample, by its index.
        tokens: the budget of a micro-batch; a sample that would exceed it starts the next, and a longer one is alone.
        start: samples of the epoch that were taken before.

    Raises:
        UserError: the whole epoch has fewer micro-batches than there are processes.
    """
    if tokens is None or lengths is None:
        batches = [order[first : first + size] for first in range(start, len(order), size)]
    else:
        batches, room = [], 0
        for index in order[start:]:
            if not batches or lengths[index] > room:
                batches.append([])
                room = tokens
            batches[-1].append(index)
            room -= lengths[index]
    if start == 0 and 0 < len(batches) < processes:
        setting = f"train.micro_batch (now {size})" if tokens is None else f"train.tokens_per_batch (now {tokens})"
        raise UserError(
            f"an epoch of {len(order)} samples has {len(batches)} micro-batches, fewer than the {processes} processes: "
            f"lower {setting} or start fewer processes"
        )
    return batches[: len(batches) // processes * processes]
