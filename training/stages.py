"""The stages of `train.stages`, one after the other; a run without stages is one stage. Called by `train.py`.

A stage is a run of its own: it has its own schedule, log and checkpoints. Stage k of several writes into
`<train.output_dir>/<k>-<name>/`, the last one into `train.output_dir` itself, where the finished model is as always.
Each begins with the weights of the last checkpoint of the stage before.

A resumed run goes on in the newest stage that has checkpoints. If nothing is left to do there, the next one begins. So
there is no other record of the progress that could disagree with the checkpoints.
"""

import difflib
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from config import Config, Parts, overridden
from errors import UserError, file_error, shortened
from model.checkpoint_folder import check_complete, list_checkpoints, recover
from model.parts import PARTS
from paths import existing_path, resolve_path
from training import state
from training.agreement import on_main
from training.build import make_accelerator
from training.dry_run import describe_run
from training.loop import Trainer
from training.run_log import check_trackers

SECTIONS = ("train", "data")  # that a stage may change, but for:
FIXED = ("train.stages", "train.output_dir", "train.init_from", "train.precision")  # a process has one precision
NAME = re.compile(r"[\w-]{1,50}")  # part of a folder's name on any system


def stages(config: Config, resume: str | None = None, accept_changes: bool = False) -> Iterator[Trainer]:
    """The trainer of each stage that is not finished, for the caller to `run` and then to forget: the next one is built
    when it is asked for, and the memory of two models may be too much.

    Args:
        config: the run.
        resume: None to start anew, `"auto"` to continue where the run was, or a checkpoint folder of any stage;
            checkpoints of the stages after it are then kept under another name.
        accept_changes: as for `training.build.Run`.

    Raises:
        SystemExit: 128 + the number of a signal.
        UserError: a wrong stage, named before any is trained; or what `Trainer` raises.
    """
    configs = stage_configs(config)
    folders = [resolve_path(stage.train.output_dir) for stage in configs]
    first, origin = (0, None) if len(configs) == 1 else _first_stage(configs, folders, resume)
    for number in range(first, len(configs)):
        stage = configs[number] if origin is None else _starting_from(configs[number], origin)
        trainer = Trainer(stage, resume if number == first else None, accept_changes)
        later = folders[number + 1 :]
        _introduce(trainer, stage_title(config, number), later)
        yield trainer
        origin = trainer.output_dir / f"checkpoint-{trainer.progress.step}"
        _conclude(trainer, origin, later)
        del trainer
        _forget_models()


def describe(config: Config) -> Iterator[str]:
    """What `describe_run` says of each stage; errors as `stages`."""
    for number, stage in enumerate(stage_configs(config)):
        title = stage_title(config, number)
        yield (f"{title}\n" if title else "") + describe_run(Trainer(stage, dry_run=True))
        _forget_models()


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage, or `config` alone.

    A stage after the first has no `train.init_from`, since the checkpoint that it starts from is not known yet.

    Raises:
        UserError: a key that a stage may not change or that does not exist, a wrong value, missing data, or trained
            weights that the next stage would have no part for; opens with `train.stages.` and the number from 0.
    """
    if not config.train.stages:
        return [config]
    base = overridden(config, {"train.stages": []}, "train.stages")
    configs: list[Config] = []
    trained: set[str] = set()
    for number, stage in enumerate(config.train.stages):
        where = f"train.stages.{number}"
        values = dict(_flat(stage))
        values.pop("name", None)
        for key in values:
            _check_key(key, where)
        name = _name(stage, where)
        if number < len(config.train.stages) - 1:
            values["train.output_dir"] = f"{config.train.output_dir}/{number + 1}-{name}"
        if number > 0:
            values["train.init_from"] = None
        made = overridden(base, values, where)
        if configs:
            _check_parts(trained, configs[-1].train.parts, made.train.parts, where)
        check_trackers(made.train)
        if made.data.image_map != base.data.image_map:
            existing_path(made.data.image_map, f"{where}.data.image_map")
        if made.data.captions != base.data.captions:
            existing_path(made.data.captions, f"{where}.data.captions")
        trained |= {part for part, settings in made.train.parts if settings.lr > 0 or _mode(settings) == "full"}
        configs.append(made)
    return configs


def stage_title(config: Config, number: int) -> str:
    """`stage 1 of 2: align`; empty without stages."""
    stages = config.train.stages
    return f"stage {number + 1} of {len(stages)}: {_name(stages[number])}" if stages else ""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys also where sections are nested, as `train.stages.0.train.epochs=2` on a command line makes them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _name(stage: dict[str, Any], where: str = "") -> str:
    name = stage.get("name", "stage")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{where}.name = {shortened(name)!r}: it becomes part of a folder's name, so take up to 50 letters, "
            "digits, '-' and '_'"
        )
    return name


def _check_key(key: str, where: str) -> None:
    section, *rest = key.split(".")
    if not rest or section not in SECTIONS or f"{section}.{rest[0]}" in FIXED:
        raise UserError(
            f"{where}: a stage cannot change '{shortened(key)}', only keys of train and data other than "
            f"{', '.join(FIXED)}: set it for the whole run"
        )
    if section == "train" and rest[0] == "parts" and rest[1:] and rest[1] not in PARTS:
        near = difflib.get_close_matches(rest[1], PARTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"parts are {', '.join(PARTS)}"
        raise UserError(f"{where}: 'train.parts.{shortened(rest[1])}' is not a part that can be trained, {hint}")


def _check_parts(trained: set[str], before: Parts, after: Parts, where: str) -> None:
    """Refuse at once what would be an error at the start of the stage, after hours of the one before."""
    following = dict(after)
    for part, settings in before:
        kept = settings.model_dump(exclude={"lr"})
        now = following[part].model_dump(exclude={"lr"}) if part in following else {}  # one that others added
        if part in trained and _mode(settings) != "frozen" and kept != now:
            key = next(key for key in kept if key not in now or kept[key] != now[key])
            raise UserError(
                f"{where}: 'train.parts.{part}.{key}' is {now.get(key)!r}, but a stage before trains this part with "
                f"{kept[key]!r} and its weights would be lost: leave it so; train.parts.{part}.lr: 0 freezes the part"
            )


def _mode(settings: Any) -> str | None:
    return settings.model_dump().get("mode")  # the projector has none


def _first_stage(configs: list[Config], folders: list[Path], resume: str | None) -> tuple[int, Path | None]:
    """The number of the stage in which the run begins or goes on, and the checkpoint that this stage began with."""
    # the group of processes is formed once, here: with the patience that a stage with a feature cache needs
    cached = [stage for stage in configs if stage.data.cache_features]
    accelerator, _ = make_accelerator((cached or configs)[0])
    if resume is None:
        for folder in folders:
            state.find_checkpoint(accelerator, folder, None)
        return 0, None
    return on_main(accelerator, lambda: _stage_to_resume(folders, resume))


def _stage_to_resume(folders: list[Path], resume: str) -> tuple[int, Path | None]:
    for folder in folders:
        recover(folder)
    number = _newest_stage(folders) if resume == "auto" else _stage_of(Path(resume), folders)
    before = list_checkpoints(folders[number - 1]) if number > 0 else []
    return number, before[-1] if before else None


def _stage_of(checkpoint: Path, folders: list[Path]) -> int:
    parent = check_complete(checkpoint).resolve().parent
    for number, folder in enumerate(folders):
        if folder.resolve() == parent:
            return number
    raise UserError(
        f"{checkpoint} is not a checkpoint of any stage of 'train.output_dir' = {folders[-1]}: resume one in "
        f"{', '.join(map(str, folders))}, or start from its weights with train.init_from"
    )


def _newest_stage(folders: list[Path]) -> int:
    output_dir = folders[-1]
    begun = [number for number, folder in enumerate(folders) if list_checkpoints(folder)]
    others = [folder for folder in output_dir.glob("[0-9]*-*") if folder not in folders and list_checkpoints(folder)]
    if others or begun != list(range(len(begun))):
        found = others[0] if others else folders[begun[-1]]
        raise UserError(
            f"'train.stages': {found} holds checkpoints, but not of a stage that can be next: set train.stages as they "
            "were, or another train.output_dir, or name the checkpoint with --resume DIR"
        )
    return max(len(begun) - 1, 0)


def _starting_from(config: Config, checkpoint: Path) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"init_from": str(checkpoint)})})


def _introduce(trainer: Trainer, title: str, later: list[Path]) -> None:
    """Say what is about to be trained; `later` are the folders of the stages after it."""
    if title:
        trainer.say(title)
    trainer.say(trainer.model.parameter_summary())
    trainer.say(
        f"{len(trainer.train_set.entries):,} questions in {len(trainer.train_set):,} samples, "
        f"{trainer.total_steps:,} steps in {trainer.precision}, {trainer.setting.micro_batch} × "
        f"{trainer.setting.accumulation} samples a step on each process"
    )
    on_main(trainer.accelerator, lambda: _set_aside(trainer, later))


def _conclude(trainer: Trainer, folder: Path, later: list[Path]) -> None:
    """Say where the trained model is, and end the program if a signal came in the last step."""
    # in quotes: a folder's name may hold spaces
    how_to_ask = "" if later else f'\nask it:  python predict.py --checkpoint "{folder}" --image FILE --question TEXT'
    trainer.say(f"trained: {folder}{how_to_ask}")
    # the last step ended by itself
    received = [number for number in gather_object([trainer.stop.received]) if number]
    if later and received:
        trainer.say("stopped by a signal before the next stage: continue with --resume auto")
        raise SystemExit(128 + received[0])


def _set_aside(trainer: Trainer, later: list[Path]) -> None:
    """Rename what the later stages made of other weights than those to come; only resuming an older stage finds any.

    From the last stage on: if the program is killed here, no stage is without the one that it began with.
    """
    for folder in reversed(later):
        try:
            names = state.set_newer_aside(folder, 0)
        except OSError as error:
            raise file_error(error, folder, "set another train.output_dir") from error
        for name in names:
            trainer.say(f"{folder / name}: a checkpoint of a later stage, kept under this name")


def _forget_models() -> None:
    """Free the memory of the stage before; a run and its accelerator refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
