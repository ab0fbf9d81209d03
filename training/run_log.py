"""Log of a run: `metrics.jsonl` (one JSON object per line), trackers and `loss.png`. Used by `watch.py`.

Each line describes the steps since the previous line, over all processes unless stated otherwise:

    step, epoch                    position of the run; epoch 1.5 is the middle of the second epoch
    loss, grad_norm                mean over the steps; the norm is measured before clipping
    projector_lr, lora_lr, …       learning rate of each trained part in the last step
    supervised_tokens              labels per step, mean
    seconds                        per step, mean; without validation and saving
    questions_per_second, tokens_per_second, supervised_tokens_per_second
                                   tokens of text and photos, without padding
    mfu                            share of the device's matrix peak, first process (`costs.py`); GPUs only
    data_wait                      share of the time that the first process waited for the data loader
    peak_memory_gib                first process, since its start: allocated on the GPU, else resident memory
    replaced_photos                unreadable photos since the run began; each was replaced by another
    val_loss, val_loss/<source>    on the validation set, over all sources and by source, at an evaluation
    moved/<part>                   relative change of its weights since the run began (`movement.py`), in the last line

A line omits figures that the device or the step does not have.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from config import Train
from errors import UserError, file_error
from training.curves import draw_curves

PROJECT = "mmultimodal-vqa"  # project name of the runs in W&B and SwanLab

logger = logging.getLogger(__name__)


def check_trackers(train: Train) -> None:
    """Check that the packages of `train.trackers` are installed. Every process calls it before loading models.

    Raises:
        UserError: a package is not installed.
    """
    for name in train.trackers:
        package = find_spec(name)
        if package is None or package.origin is None:  # a run folder wandb/ is found as a package without origin
            others = [other for other in train.trackers if other != name]
            raise UserError(
                f"'train.trackers': {name} is not installed: pip install {name}, "
                f"or set train.trackers=[{','.join(others)}]"
            )


def write_whole(file: Path, content: bytes) -> None:
    """Write `file` under a temporary name, then rename it: a crash leaves the old content or the new."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_log(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a `metrics.jsonl`; return its lines and the numbers of its broken lines (from 1).

    A last line that a crash truncated is skipped and does not count as broken.
    """
    entries, broken = [], []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = orjson.loads(line) if line.strip() else {}
        except orjson.JSONDecodeError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        elif line.strip() and number < len(lines):
            broken.append(number)
    return entries, broken


class RunLog:
    """Writer of `metrics.jsonl`, `loss.png` and the trackers; only for the first process.

    A tracker that fails causes one warning and training continues. A failed write to `metrics.jsonl` is an error.

    Args:
        folder: run folder; created if missing.
        resumed_step: lines after this step are removed, because the run repeats these steps; 0: a new log.
        trackers: config key `train.trackers`; call `check_trackers` first.
        settings: settings of the run that the trackers record, usually the whole config.

    Raises:
        UserError: the folder or the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        resumed_step: int,
        trackers: Sequence[str] = ("tensorboard",),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        self._warned: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries, broken = read_log(self.file) if resumed_step and self.file.exists() else ([], [])
            kept = [entry for entry in entries if entry["step"] <= resumed_step]
            write_whole(self.file, b"".join(orjson.dumps(entry) + b"\n" for entry in kept))
        except OSError as error:
            raise file_error(error, self.file, "free or change 'train.output_dir'") from error
        if broken:  # only a warning: resuming does not depend on the log
            numbers = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
            logger.warning("%s: line %s could not be read and was left out", self.file, numbers)
        PartialState()  # accelerate's trackers need it; in training it exists already
        self._trackers = [
            tracker
            for tracker in (_tracker(name, folder, resumed_step, settings or {}) for name in dict.fromkeys(trackers))
            if self._attempt(tracker.name, tracker.start)
        ]

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and send its finite numbers to the trackers.

        Raises:
            UserError: the line cannot be written (disk full).
        """
        try:
            with open(self.file, "ab") as stream:
                stream.write(orjson.dumps({"step": step, **figures}) + b"\n")
        except OSError as error:
            raise file_error(error, self.file) from error
        numbers = {
            name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        for tracker in self._trackers:
            self._attempt(tracker.name, lambda tracker=tracker: tracker.log(numbers, step=step))

    def draw(self) -> None:
        """Draw `loss.png` from all lines so far; the first failure logs a warning."""
        self._attempt("loss.png", self._draw)

    def close(self) -> None:
        """Finish the files and uploads of the trackers."""
        for tracker in self._trackers:
            self._attempt(tracker.name, tracker.finish)
        self._trackers = []

    def _draw(self) -> None:
        entries, _ = read_log(self.file)
        write_whole(self.folder / "loss.png", draw_curves(entries, self.folder.name))

    def _attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Run `action` and return whether it succeeded; the first failure of `name` is logged."""
        try:
            action()
        except Exception as error:  # libraries and the network may raise anything; training must continue
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s failed (%s: %s); training continues, and metrics.jsonl has all figures",
                    name,
                    type(error).__name__,
                    error,
                )
            return False
        return True


def _tracker(name: str, folder: Path, resumed_step: int, settings: dict[str, Any]) -> GeneralTracker:
    """Make accelerate's tracker `name` with its files in `folder`; it is not started."""
    # W&B and SwanLab accept each step once, so a resumed run is a new run there
    title = folder.name + (f" from step {resumed_step}" if resumed_step else "")
    arguments = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": resumed_step + 1},
        "wandb": {"run_name": PROJECT, "name": title, "dir": str(folder), "config": settings},
        "swanlab": {
            "run_name": PROJECT,
            "experiment_name": title,
            "logdir": str(folder / "swanlab"),
            "config": settings,
        },
    }
    return LOGGER_TYPE_TO_CLASS[name](**arguments[name])
