"""The record of a run: `metrics.jsonl`, one JSON object a line; the same for trackers; `loss.png`. Used by the loop.

Each line is about the steps since the line before it, over all processes where nothing else is said:

    step, epoch                    where the run is; epoch 1.5 is the middle of the second
    loss, grad_norm                mean over the steps; the norm is that before clipping
    projector_lr, lora_lr, …       learning rate of each trained part in the last step
    supervised_tokens              labels in a step, mean
    seconds                        of a step, mean; validation and saving do not count
    questions_per_second, tokens_per_second, supervised_tokens_per_second
                                   tokens are those of text and photos, without padding
    mfu                            share of the device's matrix peak, of the first process (`costs.py`); GPUs only
    data_wait                      share of the time in which the first process waited for photos and prompts
    peak_memory_gib                of the first process since its start: allocated on the GPU, else resident memory
    replaced_photos                photos that could not be read, each replaced by another, since the run began
    val_loss, val_loss/<source>    on the validation set, of all and of each source, at an evaluation
    moved/<part>                   relative change of its weights since the run began (`movement.py`), in the last line

A figure that a device or a step does not have is left out of the line.
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

PROJECT = "mmultimodal-vqa"  # the project under which W&B and SwanLab list the runs

logger = logging.getLogger(__name__)


def check_trackers(train: Train) -> None:
    """Check that the packages of `train.trackers` are installed; quick, for every process, before models are loaded.

    Raises:
        UserError: one is not; names the package.
    """
    for name in train.trackers:
        package = find_spec(name)
        if package is None or package.origin is None:  # a folder wandb/ of old runs counts as a package without origin
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
    """The lines of a `metrics.jsonl`, and the numbers of those that are broken (from 1).

    A last line cut short by a crash is no broken line: it is left out.
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
    """Writes `metrics.jsonl`, `loss.png` and the trackers' records of a run. For the first process alone.

    A tracker that fails, at its start or later, causes one warning and stops nothing; a line that cannot be written to
    `metrics.jsonl` is an error.

    Args:
        folder: the run folder; made if missing.
        resumed_step: lines after this step are removed, because these steps are repeated; 0: a new log.
        trackers: config key `train.trackers`; call `check_trackers` first.
        settings: what the trackers keep as the settings of the run, usually the whole config.

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
        if broken:  # the log is a record for people: resuming does not depend on it
            numbers = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
            logger.warning("%s: line %s could not be read and was left out", self.file, numbers)
        PartialState()  # there already in training; accelerate's trackers ask it which process this is
        self._trackers = [
            tracker
            for tracker in (_tracker(name, folder, resumed_step, settings or {}) for name in dict.fromkeys(trackers))
            if self._attempt(tracker.name, tracker.start)
        ]

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, on the disk when this returns; its numbers go to the trackers too.

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
        """Draw `loss.png` from all lines so far; a failure is warned of once."""
        self._attempt("loss.png", self._draw)

    def close(self) -> None:
        """Let the trackers finish their files and uploads."""
        for tracker in self._trackers:
            self._attempt(tracker.name, tracker.finish)
        self._trackers = []

    def _draw(self) -> None:
        entries, _ = read_log(self.file)
        write_whole(self.folder / "loss.png", draw_curves(entries, self.folder.name))

    def _attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Run `action`; whether it succeeded. Its first failure is logged under `name`."""
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
    """accelerate's tracker `name`, not started, which keeps its files in `folder`."""
    # W&B and SwanLab take no step twice, so what follows a resumption is a run of its own there
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
