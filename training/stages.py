"""Training in the stages of `train.stages`; a run without stages has one stage. Called by `train.py`.

Each stage is a separate run with its own schedule, log and checkpoints. Stage k writes into
`<train.output_dir>/<k>-<name>/`; the last stage writes into `train.output_dir` itself, like a run without stages. Each
stage starts with the weights of the last checkpoint of the previous stage.

A resumed run continues in the newest stage that has checkpoints. If that stage is finished, the next one starts. The
checkpoints are thus the only record of the progress.
"""

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from config import Config, Parts, overridden
from errors import UserError, file_error, shortened
from model.checkpoint_folder import check_complete, list_checkpoints
from model.parts import check_part_name
from paths import existing_path, resolve_path
from training import state
from training.agreement import on_main
from training.build import make_accelerator
from training.dry_run import describe_run
from training.due import save, user_problem
from training.folder_lock import recover_free
from training.loop import Trainer
from training.run_log import check_trackers

SECTIONS = ("train", "data")  # sections that a stage may change, except FIXED
FIXED = ("train.stages", "train.output_dir", "train.init_from", "train.precision")  # a process has one precision
NAME = re.compile(r"[\w-]{1,50}")  # valid in a folder name on any system


def stages(config: Config, resume: str | None = None, accept_changes: bool = False) -> Iterator[Trainer]:
    """Yield the trainer of each unfinished stage; the caller calls its `run`.

    The generator builds the next trainer when it is advanced. The caller must drop its reference before that, because
    two models may not fit into memory.

    Args:
        config: config of the run.
        resume: None: a new run; `"auto"`: continue the run; or a checkpoint folder of any stage. In the last case,
            checkpoints of later stages are renamed.
        accept_changes: as for `training.build.Run`.

    Raises:
        SystemExit: 128 + the number of a signal.
        UserError: a wrong stage, raised before any training; or an error of `Trainer`.
    """
    configs = stage_configs(config)
    folders = [resolve_path(stage.train.output_dir) for stage in configs]
    first, origin = (0, None) if len(configs) == 1 else _first_stage(configs, folders, resume)
    for number in range(first, len(configs)):
        stage = configs[number] if origin is None else _starting_from(configs[number], origin)
        try:
            trainer = Trainer(stage, resume if number == first else None, accept_changes)
        except RuntimeError as error:  # out of memory, or a process that reads photos was ended
            problem = user_problem(error, 0, stage.train.tokens_per_batch)
            if problem is None:
                raise
            raise problem from error
        later = folders[number + 1 :]
        _introduce(trainer, stage_title(config, number), later)
        yield trainer
        origin = _last_checkpoint(trainer)
        _conclude(trainer, origin, later)
        del trainer
        _forget_models()


def describe(config: Config) -> Iterator[str]:
    """Yield the text of `describe_run` for each stage; errors as `stages`."""
    for number, stage in enumerate(stage_configs(config)):
        title = stage_title(config, number)
        yield (f"{title}\n" if title else "") + describe_run(Trainer(stage, dry_run=True))
        _forget_models()


def stage_configs(config: Config) -> list[Config]:
    """Return the config of each stage; without stages, `[config]`.

    Stages after the first have no `train.init_from`, because their first checkpoint is not known yet.

    Raises:
        UserError: a key that a stage may not change, an unknown key, a wrong value, missing data, or trained weights
            without a part in the next stage. The message starts with `train.stages.` and the number from 0.
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
        if number > 0 and values.get("train.word_alignment"):
            raise UserError(f"{where}.train.word_alignment is for a new projector: set it in the first stage")
        if number > 0:
            values |= {"train.init_from": None, "train.word_alignment": 0}  # its projector is not new
        made = overridden(base, values, where)
        if configs:
            _check_parts(trained, configs[-1].train.parts, made.train.parts, where)
        check_trackers(made.train)
        if made.data.image_map != base.data.image_map:
            existing_path(made.data.image_map, f"{where}.data.image_map")
        if made.data.captions != base.data.captions:
            existing_path(made.data.captions, f"{where}.data.captions")
        _check_settings(made, where)
        trained |= {part for part, settings in made.train.parts if settings.lr > 0 or _is_whole(settings)}
        configs.append(made)
    return configs


def stage_title(config: Config, number: int) -> str:
    """Return a title like `stage 1 of 2: align`; empty without stages."""
    stages = config.train.stages
    return f"stage {number + 1} of {len(stages)}: {_name(stages[number])}" if stages else ""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys, also for nested sections, which the override `train.stages.0.train.epochs=2` creates."""
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
    if section == "train" and rest[0] == "parts" and rest[1:]:
        check_part_name(rest[1], f"{where}: ")


def _check_parts(trained: set[str], before: Parts, after: Parts, where: str) -> None:
    """Check early that a stage keeps the parts of earlier stages; otherwise the error would come after hours.

    Args:
        trained: names of the parts that earlier stages train.
        before: parts of the previous stage.
        after: parts of the stage to check.
        where: config key of the stage, for the message.
    """
    following = dict(after)
    for part, settings in before:
        kept = settings.model_dump(exclude={"lr"})
        now = following[part].model_dump(exclude={"lr"}) if part in following else {}  # missing: a custom part
        if part in trained and _mode(settings) != "frozen" and kept != now:
            key = next(key for key in kept if key not in now or kept[key] != now[key])
            raise UserError(
                f"{where}: 'train.parts.{part}.{key}' is {now.get(key)!r}, but an earlier stage trains this part with "
                f"{kept[key]!r} and its weights would be lost: leave it so; train.parts.{part}.lr: 0 freezes the part"
            )


def _check_settings(config: Config, where: str) -> None:
    """Check early what `Run` would refuse in the settings of a stage, as far as no model is needed for it."""
    parts = config.train.parts
    if config.data.cache_features and _trains(parts.vision):
        raise UserError(
            f"{where}: 'data.cache_features' keeps what the encoder gave before training, but 'train.parts.vision' "
            "trains the encoder: set data.cache_features: false in this stage"
        )
    if config.llm.quantization != "none" and _is_whole(parts.llm):
        raise UserError(
            f"{where}: 'llm.quantization' is {config.llm.quantization}, and weights in so few bits cannot be trained: "
            "set train.parts.llm.mode: lora and train.parts.llm.layers: null"
        )
    if not any(_trains(settings) for _, settings in parts):
        raise UserError(f"{where} trains nothing: give one of train.parts a learning rate above 0")


def _mode(settings: Any) -> str | None:
    return settings.model_dump().get("mode")  # the projector has none


def _trains(settings: Any) -> bool:
    return settings.lr > 0 and _mode(settings) != "frozen"


def _is_whole(settings: Any) -> bool:
    """Whether a part has weights of the backbone itself, which a checkpoint then holds."""
    return _mode(settings) == "full" or settings.model_dump().get("layers") is not None


def _first_stage(configs: list[Config], folders: list[Path], resume: str | None) -> tuple[int, Path | None]:
    """Return the number of the stage to start or resume, and the checkpoint it started from."""
    # the process group is created once, here; a stage with a feature cache needs the longer timeout
    cached = [stage for stage in configs if stage.data.cache_features]
    accelerator, _ = make_accelerator((cached or configs)[0])
    if resume is None:
        for folder in folders:
            state.find_checkpoint(accelerator, folder, None)
        return 0, None
    return on_main(accelerator, lambda: _stage_to_resume(folders, resume))


def _stage_to_resume(folders: list[Path], resume: str) -> tuple[int, Path | None]:
    for folder in folders:
        recover_free(folder)
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
    """Print a summary of the stage and rename checkpoints in `later`, the folders of the later stages."""
    if title:
        trainer.say(title)
    trainer.say(trainer.model.parameter_summary())
    budget, setting = trainer.config.train.tokens_per_batch, trainer.setting
    step = f"{setting.micro_batch} × {setting.accumulation} samples"
    if budget is not None:
        step = f"{setting.accumulation} × at most {budget:,} tokens"
    trainer.say(
        f"{len(trainer.train_set.entries):,} questions in {len(trainer.train_set):,} samples, "
        f"{trainer.total_steps:,} steps in {trainer.precision}, {step} a step on each process"
    )
    on_main(trainer.accelerator, lambda: _set_aside(trainer, later))


def _last_checkpoint(trainer: Trainer) -> Path:
    """Return the folder of the last step; of a finished run that was resumed from another folder, it is written now."""
    folder = trainer.output_dir / f"checkpoint-{trainer.progress.step}"
    ended = trainer.progress.step == trainer.total_steps
    missing = on_main(trainer.accelerator, lambda: ended and not folder.exists())
    return save(trainer) if missing else folder


def _conclude(trainer: Trainer, folder: Path, later: list[Path]) -> None:
    """Print the folder of the trained model, and end the program if a signal came in the last step."""
    # in quotes, because a folder name may contain spaces
    how_to_ask = "" if later else f'\nask it:  python predict.py --checkpoint "{folder}" --image FILE --question TEXT'
    trainer.say(f"trained: {folder}{how_to_ask}")
    # the loop ended without handling a signal that arrived after its last check
    received = [number for number in gather_object([trainer.stop.received]) if number]
    if later and received:
        trainer.say("stopped by a signal before the next stage: continue with --resume auto")
        raise SystemExit(128 + received[0])


def _set_aside(trainer: Trainer, later: list[Path]) -> None:
    """Rename the checkpoints of later stages; they exist only if an earlier stage is resumed.

    It starts with the last stage. If the program is killed here, each stage still has the stage it started from.
    """
    for folder in reversed(later):
        try:
            names = state.set_newer_aside(folder, 0)
        except OSError as error:
            raise file_error(error, folder, "set another train.output_dir") from error
        for name in names:
            trainer.say(f"{folder / name}: a checkpoint of a later stage, kept under this name")


def _forget_models() -> None:
    """Free the memory of the previous stage; garbage collection is needed for its reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
