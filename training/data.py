"""Training and validation sets from the config, and the order of samples. Called by `build.py`."""

import hashlib
import itertools
import random
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from config import Config
from dataset.compact import compact
from dataset.image_caption_dataset import ImageCaptionDataset
from dataset.records import Entry, Photo, read_records, split_entries
from errors import UserError, shortened
from model.model import MMultiModal
from paths import address, existing_path, resolve_path
from training.feature_cache import PixelLoader, cached_features
from training.signals import StopSignals, outlast_signals
from visual.augment import Augment
from visual.web import NO_SIZES

FEW_SAMPLES = 4096  # counted in this process, because starting workers would take longer


def build_datasets(
    config: Config,
    model: MMultiModal,
    photos: Mapping[int, Photo],
    train: Sequence[Entry],
    val: Sequence[Entry],
    encode: bool = True,
) -> tuple[ImageCaptionDataset, ImageCaptionDataset]:
    """Build the training and validation set; with `data.cache_features`, encode all photos first.

    Args:
        encode: False (dry run): if there is no feature cache yet, load pixels and do not encode.

    Raises:
        UserError: the weight of a source draws none of its samples; tiles of photos at an address; errors of
            `cached_features`.
    """
    features = None
    if config.visual.tiles and any(address(source.images) for source in config.data.sources):
        raise UserError(NO_SIZES)
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
    shared_photos = compact([photos[ID] for ID in range(len(photos))]) if isinstance(photos, dict) else photos

    def dataset(
        entries: Sequence[Entry],
        keep_apart: Callable[[str], Hashable],
        replace_broken: bool,
        load_photo: PixelLoader,
    ) -> ImageCaptionDataset:
        return ImageCaptionDataset(
            shared_photos,
            entries,
            model.processor.chat,
            load_photo if features is None else features,
            pixels.plan,
            min(config.data.max_length, model.language_model.longest_packed),
            max_questions,
            config.data.seed,
            keep_apart,
            replace_broken,
        )

    weights = {source.name: source.weight for source in config.data.sources}
    train_set = dataset(train, lambda source: weights.get(source, 1.0), True, augmented)
    # validation loss is reported by source; replacing unreadable photos would make losses incomparable
    val_set = dataset(val, lambda source: source, False, pixels)
    _check_weights(config, {*train_set.entry_sources, *val_set.entry_sources})
    epoch_order(train_set, weights, config.train.seed, 0)  # raises an error for a wrong weight before the first step
    return train_set, val_set


def _check_weights(config: Config, prepared: set[str]) -> None:
    """Raise UserError if a source with a weight has no entry in `prepared`, so that the weight would have no effect."""
    for source in config.data.sources:
        if source.weight != 1 and source.name not in prepared:
            raise UserError(
                f"'data.sources': source '{shortened(source.name)}' has weight {source.weight} but no entry in "
                f"{config.data.captions} (there: {shortened(', '.join(sorted(prepared)))}): correct its name, or run "
                "process_image.py again, or name the sources of these files in data.sources"
            )


def read_split(config: Config) -> tuple[Mapping[int, Photo], Sequence[Entry], Sequence[Entry]]:
    """Read the record files; return photos by ID, training entries and validation entries.

    Raises:
        UserError: one of the two files is missing or wrong, or there is no training entry.
    """
    for key in ("image_map", "captions"):
        file = resolve_path(getattr(config.data, key))
        if not file.is_file():
            raise UserError(f"'data.{key}': {file} not found: make it with python process_image.py --config FILE")
    photos, entries = read_records(
        existing_path(config.data.image_map, "data.image_map"), existing_path(config.data.captions, "data.captions")
    )
    train, val = split_entries(photos, entries, config.data.val_fraction)
    if config.data.answers == "all":
        train, val = each_answer(train), each_answer(val)
    if not train:
        raise UserError(f"'data.captions': {config.data.captions} leaves no training sample (val: {len(val)})")
    return photos, train, val


class EachAnswer(Sequence[Entry]):
    """One entry for each answer of a question; dialogues stay as they are. Made when they are read."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.numbers, self.answers = array("i"), array("i")
        for number, entry in enumerate(entries):
            count = 1 if len(entry.turns) > 1 else len(entry.turns[0].answers)
            self.numbers.extend(itertools.repeat(number, count))
            self.answers.extend(range(count))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Entry:
        return self._alone(self.entries[self.numbers[index]])[self.answers[index]]

    def __iter__(self) -> Iterator[Entry]:
        return itertools.chain.from_iterable(map(self._alone, self.entries))

    @staticmethod
    def _alone(entry: Entry) -> list[Entry]:
        if len(entry.turns) > 1:
            return [entry]
        (turn,) = entry.turns
        return [replace(entry, turns=(replace(turn, answers=(answer,)),)) for answer in turn.answers]


def each_answer(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return one entry for each answer of a question; a list stays a list."""
    alone = EachAnswer(entries)
    return list(alone) if isinstance(entries, list) else alone


def data_hash(config: Config) -> str:
    """Return a hash of both record files, for the provenance of checkpoints."""
    digest = hashlib.sha256()
    for path in (config.data.image_map, config.data.captions):
        with open(resolve_path(path), "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def epoch_order(dataset: ImageCaptionDataset, weights: dict[str, float], seed: int, epoch: int) -> "array[int]":
    """Return the sample indices of one epoch in random order.

    Args:
        weights: by source; 2.0 draws each sample twice, 0.5 draws half of the samples. Epochs draw independently, so
            the halves of two epochs overlap.

    Raises:
        UserError: there is no sample, or a small weight draws no sample of its source.
    """
    choose = random.Random(f"{seed} {epoch}")
    order = array("q")
    for source, indices in dataset.samples_by_source().items():
        weight = weights.get(source, 1.0)
        before = len(order)
        order.extend(indices * int(weight))
        order.extend(choose.sample(indices, round(len(indices) * (weight % 1))))
        if len(order) == before:
            raise UserError(
                f"'data.sources': weight {weight} of source '{source}' draws none of its {len(indices)} training "
                f"samples: set it to {1 / len(indices):.2g} or more, or leave the source out"
            )
    if not order:
        raise UserError("'data.captions': there is no training sample, so an epoch is empty")
    choose.shuffle(order)
    return order


def validation_sample(dataset: ImageCaptionDataset, count: int, seed: int) -> list[int]:
    """Return the indices of at most `count` samples in ascending order; the seed determines them.

    The Sainte-Laguë method divides them among sources: the next place goes to the source with the largest
    samples / (2 · places + 1). Each source gets at least one place if `count` is large enough.
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
        except UserError:  # training reports the error when it reads this sample
            return 0


def sample_lengths(
    dataset: ImageCaptionDataset,
    workers: int,
    indices: Sequence[int] | None = None,
    stop: StopSignals | None = None,
) -> "array[int]":
    """Count the tokens of samples, with the answers of the current epoch and without loading photos.

    A caption takes 0.5 ms, a long answer 0.8 ms. With the report's 310,000 rows and four workers this is about 45 s at
    the start of each epoch; the epoch itself takes hours.

    Args:
        workers: processes, if there are many samples.
        indices: of the samples to count; None: all. The others are 0 in the result, which has a number for each sample.
        stop: protects the workers from signals.
    """
    if indices is None:
        indices = range(len(dataset))
    loader = DataLoader(
        _Lengths(dataset),
        batch_size=1024,
        sampler=indices,
        num_workers=workers if len(indices) > FEW_SAMPLES else 0,
        collate_fn=list,
        generator=torch.Generator(),
        worker_init_fn=None if stop is None else partial(outlast_signals, stop.running),
    )
    lengths = array("i", [0]) * len(dataset)
    for index, length in zip(indices, itertools.chain.from_iterable(loader), strict=True):
        lengths[index] = length
    return lengths


class MicroBatches(Sequence[list[int]]):
    """Slices of the sample indices of an epoch, made when they are read; millions of lists would not fit into memory.

    Args:
        order: the sample indices.
        bounds: where each micro-batch starts in `order`, and where the last one ends.
        numbers: the micro-batches of this sequence; None: all.
    """

    def __init__(self, order: Sequence[int], bounds: Sequence[int], numbers: range | None = None) -> None:
        self.order, self.bounds = order, bounds
        self.numbers = range(len(bounds) - 1) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """Return the list of a micro-batch or, for a slice, some of the micro-batches."""
        numbers = self.numbers[place]
        if isinstance(numbers, range):
            return MicroBatches(self.order, self.bounds, numbers)
        return list(self.order[self.bounds[numbers] : self.bounds[numbers + 1]])


def micro_batches(
    order: Sequence[int],
    size: int,
    processes: int,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    start: int = 0,
) -> MicroBatches:
    """Cut `order[start:]` into a multiple of `processes` micro-batches; up to `processes - 1` are left out.

    If `start` is the end of a step, the result equals the rest of a cut of the whole epoch.

    Args:
        order: sample indices of a whole epoch.
        size: samples per micro-batch; not used with a token budget.
        lengths: tokens of each sample, by index.
        tokens: token budget of a micro-batch. A sample that exceeds the rest of the budget starts the next micro-batch;
            a sample longer than the budget is alone.
        start: number of samples of the epoch that are already used.

    Raises:
        UserError: the whole epoch has fewer micro-batches than processes.
    """
    if tokens is None or lengths is None:
        bounds = array("q", range(start, len(order), size))
    else:
        bounds, room = array("q"), 0
        for place in range(start, len(order)):
            length = lengths[order[place]]
            if not bounds or length > room:
                bounds.append(place)
                room = tokens
            room -= length
    bounds.append(len(order))
    batches = MicroBatches(order, bounds)
    if start == 0 and 0 < len(batches) < processes:
        setting = f"train.micro_batch (now {size})" if tokens is None else f"train.tokens_per_batch (now {tokens})"
        raise UserError(
            f"an epoch of {len(order)} samples has {len(batches)} micro-batches, fewer than the {processes} processes: "
            f"lower {setting} or start fewer processes"
        )
    return batches[: len(batches) // processes * processes]
