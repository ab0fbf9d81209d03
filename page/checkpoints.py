"""Checkpoints that the page can ask: found in the folder of a run, loaded when they are asked, freed for others."""

import copy
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from answering.answer import Answerer
from answering.request import AnyAnswerer
from errors import UserError
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import METRICS_FILE, check_complete
from model.model import MMultiModal

UNTRAINED = "untrained projector"  # name that follows the one of a checkpoint


class Engines:
    """Answerers by name. Only those that a question needs are in memory.

    Args:
        loaded: the one to begin with.
        name: its name.
        folder: of its checkpoint, beside which others are looked for; None: it is the only one, as with a server.
        overrides: config values for all checkpoints.
    """

    def __init__(
        self, loaded: AnyAnswerer, name: str, folder: Path | None = None, overrides: dict[str, Any] | None = None
    ) -> None:
        self.first = name
        self._loaded: dict[str, AnyAnswerer] = {name: loaded}
        self._folder, self._overrides = folder, overrides

    @property
    def has_weights(self) -> bool:
        """Whether models are here, and not at a server."""
        return self._folder is not None

    def names(self) -> list[tuple[str, str]]:
        """Return (what to show, name) of all complete checkpoints of the run, newest first."""
        if self._folder is None:
            return [(self.first, self.first)]
        folders = [folder for folder in self._folder.parent.glob("checkpoint-*") if _is_complete(folder)]
        usable = self.first in self._loaded or _is_complete(self._folder)  # training may have deleted it
        if self._folder not in folders and usable:  # with a name of its own
            folders.append(self._folder)
        return [(" · ".join(_facts(folder)), folder.name) for folder in sorted(folders, key=_step, reverse=True)]

    def loaded(self, name: str) -> AnyAnswerer | None:
        """Return the answerer if it is in memory."""
        return self._loaded.get(name)

    def get(self, *names: str) -> list[AnyAnswerer]:
        """Return answerers; free the models of all others, then load what is not in memory.

        The caller has the turn of the page's line, so nobody else asks meanwhile.

        Args:
            names: of `names()`; followed by `|` and `UNTRAINED`, the same model with fresh weights in its projector.

        Raises:
            UserError: no such checkpoint, or as `load_checkpoint`.
        """
        checkpoints = {name.partition("|")[0] for name in names}
        known = {name for _, name in self.names()} | self._loaded.keys()
        for name in names:  # before any model is freed, because a server's cannot be loaded again
            checkpoint, _, variant = name.partition("|")
            if checkpoint not in known or variant not in ("", UNTRAINED):
                raise UserError(f"there is no checkpoint {name!r} any more: choose another in the settings")
        for other in [name for name in self._loaded if name.partition("|")[0] not in checkpoints]:
            del self._loaded[other]
            gc.collect()  # a model is part of reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [self._get(name) for name in names]

    def _get(self, name: str) -> AnyAnswerer:
        if name not in self._loaded:
            checkpoint, _, variant = name.partition("|")
            if variant == UNTRAINED:
                trained = self._get(checkpoint)
                assert isinstance(trained, Answerer), "a server has no projector to offer"
                self._loaded[name] = Answerer(untrained_twin(trained.model))
            else:
                self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Answerer:
        assert self._folder is not None, "a server has one name, which is in memory"
        return Answerer(load_checkpoint(self._folder.with_name(name), overrides=self._overrides))


def untrained_twin(model: MMultiModal) -> MMultiModal:
    """Return a model that shares all weights with `model` but those of the projector, which are fresh."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # the copy would share it
    twin.feature_proj = model.fresh_projector()
    return twin


def _is_complete(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(check_complete(folder))
    except UserError:
        return False


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _facts(folder: Path) -> Iterator[str]:
    """Name, validation loss and date of a checkpoint, as far as they are known."""
    yield folder.name
    try:
        file = folder / METRICS_FILE
        loss = json.loads(file.read_bytes()).get("val_loss")
        if isinstance(loss, int | float):
            yield f"{loss:.4f}"
        yield time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    except (OSError, ValueError, AttributeError):  # the course report's layout has no such file
        return
