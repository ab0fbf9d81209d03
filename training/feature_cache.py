"""Encoder features of all photos in one file, encoded once for all later runs. Called by `training/data.py`.

File layout: features (crops of all photos, R, Dv) in bf16; CRC-32 of each photo's features (photos,) as uint32; `END`.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import shutil
import sys
import time
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones.backbone import backbone_fingerprint
from config import Config
from dataset.records import Photo
from errors import UserError, file_error
from model.model import MMultiModal
from model.processor import Processor
from paths import address, resolve_path, shown_path
from visual.augment import Augment
from visual.photo import load_image
from visual.shard import file_of
from visual.web import WebError, web_state
from visual_plan import VisualPlan

END = b"features complete 1"
CHECKED = 64  # photos whose checksums are verified before a file is used; reading a photo verifies its own again
ABANDONED_SECONDS = 3600  # temporary files not modified for this time belong to a killed run


class PixelLoader:
    """Function from photo to plan and pixels (C, 3, H, W); a class, because worker processes must unpickle it.

    Args:
        augment: random augmentation, different in each epoch; None: none.
    """

    def __init__(self, processor: Processor, augment: Augment | None = None, seed: int = 0) -> None:
        self.processor, self.augment, self.seed = processor, augment, seed

    def plan(self, photo: Photo) -> VisualPlan:
        """Return the plan of the photo, see `Processor.plan_of_file`."""
        return self.processor.plan_of_file(photo.picture)

    def __call__(self, photo: Photo, epoch: int = 0) -> torch.Tensor:
        image = load_image(photo.picture)
        plan = self.processor.plan(*image.size)
        if self.augment is not None:
            image = self.augment(image, f"{self.seed} {epoch} {photo.ID}")
        return self.processor.pixels(image, plan)


class FeatureLoader:
    """Function from photo to cached encoder features (C, R, Dv) bf16, verified with their checksum.

    Args:
        file: the cache file.
        IDs: IDs of its photos in ascending order.
        shape: (R, Dv).
        crops: number of crops of each photo.
    """

    def __init__(self, file: Path, IDs: list[int], shape: tuple[int, int], crops: list[int]) -> None:
        self.file = file
        self.IDs = array("q", IDs)
        self.shape = shape
        self.ends = array("q", itertools.accumulate(crops))  # number of crops up to and including each photo
        self.crop_bytes = shape[0] * shape[1] * 2
        self.features_bytes = (self.ends[-1] if IDs else 0) * self.crop_bytes
        self.size = self.features_bytes + 4 * len(IDs) + len(END)  # bytes of a complete file

    def __call__(self, photo: Photo, epoch: int = 0) -> torch.Tensor:
        try:
            block = self._block(bisect_left(self.IDs, photo.ID))
        except OSError as error:
            raise file_error(error, self.file) from error
        if block is None:
            raise UserError(
                f"{self.file}: the features of {shown_path(photo.path)} are damaged: delete the file and start again"
            )
        return torch.frombuffer(block, dtype=torch.bfloat16).view(-1, *self.shape)

    def _block(self, row: int) -> bytearray | None:
        """Read the bytes of a photo's features; None if they do not match their checksum."""
        start = self.ends[row - 1] if row else 0
        block = bytearray((self.ends[row] - start) * self.crop_bytes)
        # open the file for each read (0.02 ms): forked workers would share the position of an open file, and reading
        # a truncated memory-mapped file would kill the process
        with open(self.file, "rb") as stream:
            stream.seek(start * self.crop_bytes)
            stream.readinto(block)
            stream.seek(self.features_bytes + row * 4)
            checksum = stream.read(4)
        return block if zlib.crc32(block).to_bytes(4, "little") == checksum else None

    def problem(self) -> str | None:
        """Return the problem of the file; None if it is complete and the checked photos match their checksums."""
        size = self.file.stat().st_size
        if size != self.size:
            return f"it has {size:,} bytes and not {self.size:,}"
        with open(self.file, "rb") as stream:
            stream.seek(-len(END), os.SEEK_END)
            if stream.read() != END:
                return "its end is missing"
        count = len(self.IDs)
        rows = sorted({number * (count - 1) // (CHECKED - 1) for number in range(CHECKED)}) if count else []
        damaged = next((row for row in rows if self._block(row) is None), None)
        return None if damaged is None else f"the features of photo {self.IDs[damaged]} do not match their checksum"


class _Pixels(Dataset):
    def __init__(self, photos: list[Photo], load: PixelLoader) -> None:
        self.photos, self.load = photos, load

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> torch.Tensor | UserError:
        photo = self.photos[index]
        try:
            return self.load(photo)
        except WebError as error:
            return error
        except UserError as error:
            return UserError(photo.problem(error))


def cached_features(
    model: MMultiModal, photos: list[Photo], config: Config, encode: bool = True
) -> FeatureLoader | None:
    """Encode every photo once; later runs with the same encoder and photos read the file.

    Several runs can fill one cache at the same time. Each writes its own file, and the first complete file is used.

    Args:
        photos: in ascending order of their IDs.
        encode: False: return None if there is no valid file yet.

    Raises:
        UserError: an unreadable photo, a folder that is not writable, or a full disk.
    """
    shape = (model.encoder.grid.rows, model.encoder.width)
    folder = resolve_path(config.data.feature_cache)
    pixels = PixelLoader(model.processor)
    file = folder / f"{_digest(model, photos, config)}.bf16"
    loader = FeatureLoader(file, [photo.ID for photo in photos], shape, [pixels.plan(photo).crops for photo in photos])
    try:
        problem = loader.problem() if loader.file.exists() else ""
        if problem is None:
            return loader
        if not encode:
            return None
        if problem:
            tqdm.write(f"{loader.file}: {problem}; all photos are encoded again", file=sys.stderr)
        _fill(loader, model, photos, config)
    except OSError as error:
        advice = (
            "'data.feature_cache' must be a folder that can be written to and has room for the "
            f"{loader.size / 2**20:,.0f} MiB that the features of {len(photos):,} photos take"
        )
        raise file_error(error, error.filename or loader.file, advice) from error
    return loader


def _fill(loader: FeatureLoader, model: MMultiModal, photos: list[Photo], config: Config) -> None:
    """Write the file under a unique temporary name, then rename it."""
    file = loader.file
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file)
    if shutil.disk_usage(file.parent).free < loader.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # a process on another machine may have the same process ID
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    checksums = []
    try:
        with open(temporary, "wb") as stream:
            for block in _encoded(model, photos, config):
                stream.write(block)
                checksums.append(zlib.crc32(block).to_bytes(4, "little"))
            stream.write(b"".join([*checksums, END]))
            stream.flush()
            os.fsync(stream.fileno())
        # another run may have finished first; Windows cannot replace a file that is being read
        if not (file.exists() and loader.problem() is None):
            temporary.replace(file)
    finally:
        with contextlib.suppress(OSError):  # keep the first error, which is more informative
            temporary.unlink(missing_ok=True)


def _digest(model: MMultiModal, photos: list[Photo], config: Config) -> str:
    digest = hashlib.sha256(
        f"{backbone_fingerprint(model.visual_folder)} {model.processor.transform.fingerprint()} "
        f"{model.encoder.grid} {config.visual.tiles} {model.encoder.dtype}".encode()
    )
    if config.visual.feature != "output":
        digest.update(config.visual.feature.encode())
    inside = {id(weight) for weight in model.encoder.parameters()}
    for part in model.parts:  # weights of an encoder that an earlier run trained differ from the backbone file
        for name, weight in part.parameters.items():
            if id(weight) in inside:
                digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    for photo in photos:
        digest.update(f"{photo.key}{photo.box or ''} {_state(photo)}\n".encode())
    return digest.hexdigest()[:16]


def _state(photo: Photo) -> str:
    """Return what changes with the file of a photo."""
    file = file_of(photo.path)
    if address(file):
        return web_state(file)
    try:
        state = file.stat()
    except OSError as error:
        raise UserError(f"photo {photo.path} cannot be read: {error.strerror}") from error
    return f"{state.st_size} {state.st_mtime_ns}"


def encoded_photos(model: MMultiModal, photos: list[Photo], workers: int) -> Iterator[torch.Tensor | str]:
    """Yield the features of each photo, (C, R, Dv) bf16 on the CPU, or the problem of an unreadable one.

    Raises:
        WebError: a store does not answer.
    """
    model.eval()  # features without dropout
    loader = PixelLoader(model.processor)
    pixels = DataLoader(
        _Pixels(photos, loader),
        batch_size=8,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # by default, the loader would advance the global generator
    )
    for batch in tqdm(pixels, desc="encoding photos", unit="batch", dynamic_ncols=True):
        for item in batch:
            if isinstance(item, WebError):
                raise item
        readable = [item for item in batch if isinstance(item, torch.Tensor)]
        features = iter(())
        if readable:
            encoded = model.encode_image(torch.cat(readable).to(model.device)).to(torch.bfloat16).cpu()
            features = iter(encoded.split([len(crops) for crops in readable]))
        for item in batch:
            yield next(features) if isinstance(item, torch.Tensor) else str(item)


def _encoded(model: MMultiModal, photos: list[Photo], config: Config) -> Iterator[Any]:
    """Yield the bytes of each photo's features."""
    for features in encoded_photos(model, photos, config.train.workers):
        if isinstance(features, str):
            raise UserError(features)
        yield features.contiguous().view(torch.uint8).flatten().numpy()


def _remove_abandoned(file: Path) -> None:
    """Delete temporary files that killed runs left in the folder of the caches, also those of other data."""
    for temporary in file.parent.glob("*.bf16.*.tmp"):
        with contextlib.suppress(OSError):  # another run may delete it at the same time
            if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()
