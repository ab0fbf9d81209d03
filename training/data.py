"""From the config to training and validation sets, and the order in which samples are drawn. Called by `loop.py`."""

import hashlib
import random
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import Config
from dataset.image_caption_dataset import ImageCaptionDataset
from dataset.records import Entry, Photo, read_records, split_entries
from errors import UserError
from model.backbone import backbone_fingerprint
from model.model import MMultiModal
from paths import existing_path, resolve_path
from visual.transform import load_image


def build_datasets(config: Config, model: MMultiModal, photos: dict[int, Photo], train: list[Entry], val: list[Entry]):
    """Training and validation `ImageCaptionDataset`; encodes all photos first where `data.cache_features` is on."""
    photo_key = "image_features" if config.data.cache_features else "pixel_values"
    if config.data.cache_features:
        used = sorted({ID for entry in [*train, *val] for ID in entry.images})
        load_photo = cached_features(model, [photos[ID] for ID in used], config)
    else:
        load_photo = PixelLoader(model.transform)
    max_questions = config.train.max_questions if config.train.pack_questions else 1
    return tuple(
        ImageCaptionDataset(
            photos, entries, model.chat, load_photo, photo_key, config.data.max_length, max_questions, config.data.seed
        )
        for entries in (train, val)
    )


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


class PixelLoader:
    """Photo → pixels (3, H, W); a class, so that worker processes can receive it."""

    def __init__(self, transform) -> None:
        self.transform = transform

    def __call__(self, photo: Photo) -> torch.Tensor:
        return self.transform(load_image(photo.path))


class FeatureLoader:
    """Photo → cached encoder features (N, Dv) bf16, read from a memory-mapped file."""

    def __init__(self, file: Path, IDs: list[int], shape: tuple[int, int]) -> None:
        self.file = file
        self.row_of = {ID: row for row, ID in enumerate(IDs)}
        self.shape = shape
        self._features: torch.Tensor | None = None

    def __call__(self, photo: Photo) -> torch.Tensor:
        if self._features is None:  # opened by each worker for itself
            size = len(self.row_of) * self.shape[0] * self.shape[1]
            mapped = torch.from_file(str(self.file), shared=False, size=size, dtype=torch.bfloat16)
            self._features = mapped.view(len(self.row_of), *self.shape)
        return self._features[self.row_of[photo.ID]]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_features": None}


class _Pixels(Dataset):
    def __init__(self, photos: list[Photo], load: PixelLoader) -> None:
        self.photos, self.load = photos, load

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return self.load(self.photos[index])
        except UserError as error:
            return str(error)


def cached_features(model: MMultiModal, photos: list[Photo], config: Config) -> FeatureLoader:
    """Encode every photo once; later runs with the same encoder and photos read the file.

    Raises:
        UserError: a broken photo.
    """
    digest = hashlib.sha256(
        f"{backbone_fingerprint(model.visual_folder)} {model.transform.fingerprint()} {model.num_image_tokens} "
        f"{config.visual.drop_first_token} {model.encoder.dtype}".encode()
    )
    for photo in photos:
        try:
            state = photo.path.stat()
        except OSError as error:
            raise UserError(f"photo {photo.path} cannot be read: {error.strerror}") from error
        digest.update(f"{photo.key} {state.st_size} {state.st_mtime_ns}\n".encode())
    shape = (model.num_image_tokens, model.encoder.config.hidden_size)
    file = resolve_path(config.data.feature_cache) / f"{digest.hexdigest()[:16]}.bf16"
    loader = FeatureLoader(file, [photo.ID for photo in photos], shape)
    if file.exists() and file.stat().st_size == len(photos) * shape[0] * shape[1] * 2:
        return loader
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    pixels = DataLoader(
        _Pixels(photos, PixelLoader(model.transform)), batch_size=8, num_workers=config.train.workers, collate_fn=list
    )
    with open(temporary, "wb") as stream:
        for batch in tqdm(pixels, desc="encoding photos", unit="batch", dynamic_ncols=True):
            for item in batch:
                if isinstance(item, str):
                    raise UserError(item)
            features = model.encode_image(torch.stack(batch).to(model.device))  # (8, N, Dv)
            stream.write(features.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    temporary.replace(file)
    return loader


def epoch_order(dataset: ImageCaptionDataset, weights: dict[str, float], seed: int, epoch: int) -> list[int]:
    """Sample indices of one epoch in random order.

    Args:
        weights: by source; 2.0 draws each sample of it twice, 0.5 half of them, another half each epoch.
    """
    choose = random.Random(f"{seed} {epoch}")
    by_source: dict[str, list[int]] = {}
    for index, group in enumerate(dataset.groups):
        by_source.setdefault(dataset.entries[group[0]].source, []).append(index)
    order = []
    for source, indices in sorted(by_source.items()):
        weight = weights.get(source, 1.0)
        order += indices * int(weight)
        order += choose.sample(indices, round(len(indices) * (weight % 1)))
    choose.shuffle(order)
    return order


class _Lengths(Dataset):
    def __init__(self, dataset: ImageCaptionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        try:
            return len(self.dataset.tokens(index)["input_ids"])
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
    order: list[int], size: int, processes: int, lengths: list[int] | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Cut `order` into micro-batches, as many as all processes can share; at most `processes - 1` are left out.

    Args:
        size: samples of a micro-batch, unless there is a token budget.
        lengths: tokens of each sample, by its index.
        tokens: the budget: a micro-batch goes on until the next sample would exceed it; a longer sample goes alone.
    """
    if tokens is None:
        batches = [order[start : start + size] for start in range(0, len(order), size)]
    else:
        batches, room = [], 0
        for index in order:
            if not batches or lengths[index] > room:
                batches.append([])
                room = tokens
            batches[-1].append(index)
            room -= lengths[index]
    return batches[: max(len(batches) // processes, 1) * processes]


def validation_sample(dataset: ImageCaptionDataset, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
