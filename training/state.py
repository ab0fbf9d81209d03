"""Checkpoints of a run: save, find, compare and delete. Called by `build.py`, `loop.py`, `due.py` and `stages.py`.

A checkpoint contains the state after a whole step: weights, optimizer, schedule, random generators and the position in
the data. The position is counted in samples, so a resumed run can use another step size. Old checkpoints are deleted
only after a successful save.
"""

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any, Protocol

import orjson
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import BaseFileLock
from torch.optim.lr_scheduler import LambdaLR

from backbones.backbone import remember_backbones
from config import Config, Prompt
from errors import UserError, file_error
from model.checkpoint import save_checkpoint
from model.checkpoint_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PROVENANCE_FILE,
    STATE_FILE,
    check_complete,
    damage,
    list_checkpoints,
    read_provenance,
)
from model.model import MMultiModal
from training.agreement import all_or_none, on_main
from training.estimate import Setting
from training.folder_lock import hold, recover_free
from training.movement import WeightSample
from training.sharding import shards_of, whole, whole_parts

POSITION = ("step", "epoch", "samples")  # attributes of `Progress` that metrics.json shows


@dataclasses.dataclass
class Progress:
    """The position of a run after a whole step.

    Attributes:
        step: number of finished optimizer steps.
        epoch, samples: number of finished epochs, and of samples trained on in the current epoch.
        generators: state of this process's random generators.
        window: figures of the steps since the last log line.
        unreadable: error messages of photos whose sample was replaced.
        skipped: consecutive steps that the fp16 scaler skipped.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    generators: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    window: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unreadable: list[str] = dataclasses.field(default_factory=list)
    skipped: int = 0

    def advance(self, samples: int, last_of_epoch: bool, device: torch.device) -> None:
        """Count a step over `samples` samples."""
        self.step += 1
        self.epoch, self.samples = (self.epoch + 1, 0) if last_of_epoch else (self.epoch, self.samples + samples)
        self.note_generators(device)

    def note_generators(self, device: torch.device) -> None:
        """Store the current state of the generators, for a checkpoint that is saved during the next step."""
        self.generators = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            self.generators[device.type] = torch.get_device_module(device).get_rng_state()

    def restore_generators(self, device: torch.device) -> None:
        """Set the generators to the stored state."""
        torch.set_rng_state(self.generators["cpu"])
        if device.type != "cpu" and device.type in self.generators:
            torch.get_device_module(device).set_rng_state(self.generators[device.type])


class Resumable(Protocol):
    """Attributes of `training.build.Run` that saving and restoring use."""

    config: Config
    accelerator: Accelerator
    output_dir: Path
    in_use: BaseFileLock
    model: MMultiModal
    optimizer: Any
    schedule: LambdaLR
    setting: Setting
    total_steps: int
    provenance: dict[str, Any]
    progress: Progress
    start: WeightSample | None

    def say(self, sentence: str) -> None: ...


def find_checkpoint(accelerator: Accelerator, output_dir: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to resume. The first process chooses, because other disks may lack the folder.

    Args:
        resume: `auto`: the newest of `output_dir`; a folder; or None: a new run.

    Raises:
        UserError: a damaged checkpoint (the message names its files and an intact older one), a checkpoint that is
            missing on another machine, another run that is training in the folder, or a new run in a folder that
            already contains checkpoints.
    """
    folder = on_main(accelerator, lambda: _choose(output_dir, resume))
    unseen = folder is not None and not (folder / PROVENANCE_FILE).is_file()
    all_or_none(
        accelerator,
        f"{folder} is not on this machine: set train.output_dir to a folder that all machines share, or copy it here"
        if unseen
        else None,
    )
    return folder


def _choose(output_dir: Path, resume: str | None) -> Path | None:
    recover_free(output_dir)
    existing = list_checkpoints(output_dir)
    if resume is None:
        if existing:
            raise UserError(
                f"'train.output_dir': {output_dir} already holds {existing[-1].name}: go on from it with "
                "--resume auto, or set another train.output_dir"
            )
        return None
    if resume == "auto":
        if not existing:
            return None
        folder = existing[-1]
    else:
        folder = check_complete(Path(resume))
        if existing and folder.resolve() not in [path.resolve() for path in existing]:
            raise UserError(
                f"{folder} is not a checkpoint of 'train.output_dir' = {output_dir}, which holds {existing[-1].name}: "
                "set another train.output_dir, or resume one of its own"
            )
    problems = damage(folder)
    if problems:
        older = next((path for path in reversed(existing) if path != folder and not damage(path)), None)
        advice = f"{older} is sound: resume it with --resume {older}" if older else "no other checkpoint here is sound"
        raise UserError(f"{folder} cannot be resumed: {'; '.join(problems)}. {advice}")
    return folder


def read_state(folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Read the training state of a checkpoint, as written by `save`.

    Raises:
        UserError: an older format, a damaged file, or another number of processes.
    """
    if read_provenance(folder).get("format_version", 1) < 2:
        raise UserError(
            f"{folder} was written by an earlier version of this code, which kept another position in the data: it "
            f"cannot be resumed, but its weights load; start from them with train.init_from={folder}"
        )
    file = folder / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}): resume an older checkpoint") from error
    if state["processes"] != accelerator.num_processes:
        raise UserError(
            f"{folder.name} was written by {state['processes']} processes, this run has "
            f"{accelerator.num_processes}: resume with as many, or start from its weights with train.init_from"
        )
    return state


def run_shape(config: Config, data: str) -> dict[str, Any]:
    """Return the settings that determine samples, order and prompts; a resumed run must have the same.

    Args:
        data: hash of the two record files.
    """
    train = config.train
    return {
        "data": data,
        "data.val_fraction": config.data.val_fraction,
        "data.seed": config.data.seed,
        "data.max_length": config.data.max_length,
        "data.answers": config.data.answers,
        "train.seed": train.seed,
        "train.max_questions": train.max_questions if train.pack_questions else 1,
        "weights of the sources": {source.name: source.weight for source in config.data.sources},
        "visual.tiles": config.visual.tiles,
        "prompt": config.prompt.model_dump(),
    }


def accepted_changes(folder: Path, shape: dict[str, Any], accept: bool) -> list[dict[str, Any]]:
    """Return the settings that were changed at this and earlier resumes, for the provenance.

    Raises:
        UserError: a setting of the shape has changed and `accept` is false; the message has both values.
    """
    provenance = read_provenance(folder)
    saved = provenance.get("shape", {})
    if "prompt" in saved:  # keys that are newer than the run had the values of today's defaults
        saved["prompt"] = Prompt().model_dump() | saved["prompt"]
    changed = {key: [saved[key], value] for key, value in shape.items() if key in saved and saved[key] != value}
    earlier = provenance.get("accepted_changes", [])
    if not changed:
        return earlier
    if not accept:
        differences = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in changed.items())
        raise UserError(
            f"{folder} belongs to another run: {differences}. Set these back, or resume all the same by "
            "adding --accept-changes: the position in the data then means other samples"
        )
    return [*earlier, {"checkpoint": folder.name, "changes": changed}]


def make_ready(run: Resumable) -> None:
    """Create the run folder on the first process, hold its lock, and rename checkpoints beyond the resumed step.

    Raises:
        UserError: the folder cannot be created or changed, or another run is training in it.
    """

    def make() -> None:
        try:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            hold(run.in_use)
            names = set_newer_aside(run.output_dir, run.progress.step)
            remember_backbones(run.output_dir, run.model.visual_folder, run.model.llm_folder)
        except OSError as error:
            raise file_error(error, run.output_dir, "set another train.output_dir") from error
        for name in names:
            run.say(f"{name}: a checkpoint beyond the resumed step, kept under this name")

    on_main(run.accelerator, make)


def set_newer_aside(output_dir: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step` and return their new names."""
    names = []
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            number, aside = 1, folder.with_name(f"{folder.name}.superseded")
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{folder.name}.superseded-{number}")
            folder.rename(aside)
            names.append(aside.name)
    return names


def prune(output_dir: Path, keep: int, newest: Path) -> None:
    """Delete the oldest checkpoints by writing time until `keep` are left; `newest` always stays."""
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]
    others.sort(key=lambda folder: (folder / CONFIG_FILE).stat().st_mtime_ns if (folder / CONFIG_FILE).is_file() else 0)
    for folder in others[: max(len(others) - keep + 1, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def save(run: Resumable, progress: Progress, figures: dict[str, Any], pruning: bool = True) -> Path:
    """Write `checkpoint-<step>`, then prune; all processes call it together.

    Args:
        figures: content of `metrics.json`.
        pruning: False: keep all older checkpoints, for a save after an error.

    Raises:
        UserError: the checkpoint could not be written; all processes raise it, and nothing was deleted.
    """
    folder = run.output_dir / f"checkpoint-{progress.step}"
    all_generators = gather_object([progress.generators])
    writes = run.accelerator.is_main_process
    optimizer = whole(run.optimizer.state_dict(), writes)

    def write() -> None:
        scaler = run.accelerator.scaler
        state = {
            "progress": {**dataclasses.asdict(progress), "generators": all_generators},
            "setting": dataclasses.asdict(run.setting),
            "total_steps": run.total_steps,
            "processes": run.accelerator.num_processes,
            "start": run.start,
            "optimizer": optimizer,
            "schedule": run.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        position = {key: getattr(progress, key) for key in POSITION}
        save_checkpoint(run.model, folder, figures | position, run.provenance, state)
        if pruning:
            prune(run.output_dir, run.config.train.save_total_limit, newest=folder)

    with whole_parts(run.model, writes):
        on_main(run.accelerator, write)
    return folder


def saved_figures(folder: Path) -> dict[str, Any]:
    """Return what `save` got as `figures`; {} if it cannot be read, as no run depends on it."""
    try:
        figures = orjson.loads((folder / METRICS_FILE).read_bytes())
        return {name: figure for name, figure in figures.items() if name not in POSITION}
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return {}


def restore(run: Resumable, state: dict[str, Any]) -> Progress:
    """Restore optimizer, schedule, scaler and generators; return the position of the run.

    Learning rates, weight decay and betas come from the config, even if they have changed.

    Raises:
        UserError: this run trains other parts than the checkpoint.
    """
    groups = [group["name"] for group in run.optimizer.param_groups]
    saved_groups = [group["name"] for group in state["optimizer"]["param_groups"]]
    if groups != saved_groups:
        before, now = (", ".join(dict.fromkeys(names)) for names in (saved_groups, groups))
        raise UserError(
            f"the checkpoint trained {before}, this run trains {now}: "
            "leave train.parts as it was, or start a new run with train.init_from"
        )
    values = shards_of(state["optimizer"]["state"], run.optimizer)
    run.optimizer.load_state_dict({"state": values, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.schedule.load_state_dict(state["schedule"] | {"base_lrs": run.schedule.base_lrs})
    # recompute the rate of the next step: the new schedule may be longer than the saved one
    factors = [factor(run.schedule.last_epoch) for factor in run.schedule.lr_lambdas]
    for group, peak, factor in zip(run.optimizer.param_groups, run.schedule.base_lrs, factors, strict=True):
        group["lr"] = peak * factor
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    saved = state["progress"]
    progress = Progress(**saved | {"generators": saved["generators"][run.accelerator.process_index]})
    progress.restore_generators(run.accelerator.device)
    return progress
