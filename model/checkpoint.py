"""The checkpoint folder: one self-describing place for a trained model.

Written by `training/loop.py`, read by every script.

    config.yaml                  the resolved run; names and relative paths, never an absolute one
    adapter_config.json          LoRA in peft's own layout
    adapter_model.safetensors
    feature_proj.safetensors     the projector
    provenance.json              fingerprints of backbones, prompt and transform; versions, commit, data hash
    metrics.json                 the last training and validation figures
    trainer_state/               optimizer, scheduler, random generators, position in the data

Frozen weights are not in it. The layout of the course report's published checkpoint is read too
(`model/report_layout.py`). A folder is written under a temporary name, flushed to disk and renamed, so one that bears
its final name is complete.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch
import yaml
from safetensors.torch import load_file, save_file

from config import Config, load_config
from errors import UserError, shortened
from model import report_layout
from model.backbone import backbone_fingerprint
from paths import REPO_ROOT, nearest_name_hint

if TYPE_CHECKING:
    from model.model import MMultiModal

CONFIG_FILE = "config.yaml"
PROJECTOR_FILE = "feature_proj.safetensors"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.json"
REQUIRED_FILES = (CONFIG_FILE, PROJECTOR_FILE, PROVENANCE_FILE, "adapter_config.json", "adapter_model.safetensors")


def portable_config(config: Config) -> dict[str, Any]:
    """The config as a mapping whose paths hold on other machines: relative to the repository, else the bare name."""
    raw = config.model_dump(mode="json")

    def portable(path: str) -> str:
        if not Path(path).expanduser().is_absolute():
            return path
        absolute = Path(path).expanduser()
        return absolute.relative_to(REPO_ROOT).as_posix() if absolute.is_relative_to(REPO_ROOT) else absolute.name

    raw["model_root"] = portable(raw["model_root"])
    for section, keys in {
        "visual": ["path"],
        "llm": ["path"],
        "data": ["image_map", "captions", "feature_cache"],
        "train": ["output_dir", "init_from"],
    }.items():
        for key in keys:
            if raw[section][key] is not None:
                raw[section][key] = portable(raw[section][key])
    for source in raw["data"]["sources"]:
        for key in ("annotations", "images", "questions"):
            if source[key] is not None:
                source[key] = portable(source[key])
    return raw


def fingerprints(model: "MMultiModal") -> dict[str, str]:
    """What the trained weights depend on, one hash each: both backbones, the prompt and the image transform."""
    return {
        "visual": backbone_fingerprint(model.visual_folder),
        "llm": backbone_fingerprint(model.llm_folder),
        "prompt": model.chat.fingerprint(),
        "transform": model.transform.fingerprint(),
    }


def save_checkpoint(
    model: "MMultiModal",
    folder: Path,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    save_trainer_state: Callable[[Path], None],
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: final name; an existing complete folder of that name is replaced.
        provenance: versions, commit, data hash; fingerprints are added here.
        save_trainer_state: writes its files into the folder it is given.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "trainer_state").mkdir(parents=True)
    # the embedding is never trained, so peft is told not to look on the hub whether it was resized
    model.LLM.save_pretrained(temporary, save_embedding_layers=False)
    adapter_config = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
    adapter_config["base_model_name_or_path"] = portable_config(model.config)["llm"]["path"]  # peft's is absolute
    _write_json(temporary / "adapter_config.json", adapter_config)
    (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.feature_proj.state_dict().items()},
        temporary / PROJECTOR_FILE,
    )
    (temporary / CONFIG_FILE).write_text(
        yaml.safe_dump(portable_config(model.config), allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    _write_json(temporary / PROVENANCE_FILE, {**provenance, "fingerprints": fingerprints(model)})
    _write_json(temporary / METRICS_FILE, metrics)
    save_trainer_state(temporary / "trainer_state")
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def check_complete(folder: Path) -> Path:
    """`folder` itself if it holds a whole checkpoint.

    Raises:
        UserError: it does not exist or lacks files; names them.
    """
    folder = REPO_ROOT / folder
    if not os.path.isdir(folder):  # unlike Path.is_dir it takes names that are too long
        raise UserError(f"checkpoint folder not found: {shortened(folder)}. {nearest_name_hint(folder)}".rstrip())
    required = report_layout.REQUIRED_FILES if report_layout.is_report_checkpoint(folder) else REQUIRED_FILES
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        inside = sorted(child.name for child in folder.glob("checkpoint-*"))
        hint = f"; did you mean {folder / inside[-1]}?" if inside else ""
        raise UserError(f"{folder} is not a complete checkpoint, it lacks {', '.join(missing)}{hint}")
    return folder


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; unfinished ones (`.tmp`) are not among them."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_config(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The config a checkpoint was trained with, with `overrides` by dotted key; errors as `check_complete`."""
    folder = check_complete(folder)
    if report_layout.is_report_checkpoint(folder):
        return report_layout.read_report_config(folder, overrides or {})
    return load_config(folder / CONFIG_FILE, overrides)


def restore_weights(model: "MMultiModal", folder: Path) -> None:
    """Put LoRA and projector of a checkpoint into `model` and check what they were trained on.

    Raises:
        UserError: another backbone, prompt or transform than in training, other LoRA settings, or tensors that do not
            fit.
    """
    folder = check_complete(folder)
    if report_layout.is_report_checkpoint(folder):
        lora = report_layout.lora_settings(folder)
        adapter, projector = report_layout.read_report_tensors(folder)
        files = ("adapter_model.bin", report_layout.PROJECTOR_FILE)
    else:
        _check_fingerprints(model, folder)
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        lora = {"r": saved["r"], "alpha": saved["lora_alpha"], "target_modules": saved["target_modules"]}
        adapter, projector = load_file(folder / "adapter_model.safetensors"), load_file(folder / PROJECTOR_FILE)
        files = ("adapter_model.safetensors", PROJECTOR_FILE)
    ours = model.config.llm.lora
    if (ours.r, ours.alpha, set(ours.target_modules)) != (lora["r"], lora["alpha"], set(lora["target_modules"])):
        raise UserError(
            f"'llm.lora' differs from the adapter in {folder}: that has r={lora['r']}, alpha={lora['alpha']}, "
            f"target_modules={sorted(lora['target_modules'])}"
        )
    own = {name.replace(".default", ""): tensor for name, tensor in model.LLM.named_parameters() if "lora_" in name}
    _copy_exactly(own, adapter, folder / files[0])
    _copy_exactly(dict(model.feature_proj.named_parameters()), projector, folder / files[1])


def _check_fingerprints(model: "MMultiModal", folder: Path) -> None:
    expected = orjson.loads((folder / PROVENANCE_FILE).read_bytes())["fingerprints"]
    actual = fingerprints(model)
    places = {"visual": ("visual.path", model.visual_folder), "llm": ("llm.path", model.llm_folder)}
    for part, (key, backbone) in places.items():
        if actual[part] != expected[part]:
            raise UserError(
                f"{folder} was trained on another '{key}': its backbone has the fingerprint {expected[part]}, "
                f"{backbone} has {actual[part]}. Set {key}=FOLDER to the model it was trained with"
            )
    if actual["prompt"] != expected["prompt"]:
        raise UserError(f"{folder} was trained with another prompt: leave prompt.* as in its {CONFIG_FILE}")
    if actual["transform"] != expected["transform"]:
        raise UserError(f"{folder} was trained with other preprocessor settings than {model.visual_folder} has now")


def _copy_exactly(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], file: Path) -> None:
    own = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing: {name}" for name in sorted(own.keys() - saved.keys())]
    problems += [f"left over: {name}" for name in sorted(saved.keys() - own.keys())]
    problems += [
        f"{name} is {saved[name]}, the model needs {own[name]}"
        for name in sorted(own.keys() & saved.keys())
        if own[name] != saved[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{file} does not fit the model: {'; '.join(problems[:5])}{more}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
