"""The checkpoint folder: one self-describing place for a trained model.

Written by `training/state.py`, read by every script.

    config.yaml                  the resolved run; names and relative paths, never an absolute one
    adapter_config.json          LoRA in peft's own layout
    adapter_model.safetensors
    feature_proj.safetensors     the projector
    provenance.json              format version, checksums, fingerprints of backbones, prompt and transform; library
                                 versions, commit, and what shaped the run (data, split, seeds, packing)
    metrics.json                 the last training and validation figures
    trainer_state/               optimizer, scheduler, random generators, position in the data

Frozen weights are not in it. The layout of the course report's published checkpoint is read too
(`model/report_layout.py`). A folder is written under a temporary name, flushed to disk and renamed, so a folder with
its final name is complete.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from backbones.backbone import backbone_fingerprint, same_backbone
from config import Config, load_config
from errors import UserError, file_error
from model import report_layout
from model.checkpoint_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    PROJECTOR_FILE,
    PROVENANCE_FILE,
    STATE_FILE,
    changed,
    check_complete,
    checksum,
    flush,
    put_in_place,
    read_provenance,
)
from model.model import MMultiModal
from model.precision import DTYPES, pick_device, pick_precision
from paths import REPO_ROOT


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overrides: dict[str, Any] | None = None,
) -> MMultiModal:
    """Load a checkpoint folder for answering.

    Args:
        folder: as `save_checkpoint` wrote it, or the course report's published checkpoint.
        device: default as `model.precision.pick_device`.
        dtype: of all weights that are not quantised; default bf16 on a GPU that has it, else float32.
        overrides: config values by dotted key, for example `{"llm.path": "/models/Qwen2.5-0.5B"}`; the values are
            taken as they are.

    Raises:
        UserError: not a complete checkpoint, or its backbones are missing or are others than it was trained on.
    """
    folder = check_complete(Path(folder))
    device = pick_device(device)
    if dtype is None:
        dtype = DTYPES[pick_precision("auto", device)] if device.type == "cuda" else torch.float32
    config = read_config(folder, overrides)
    model = MMultiModal.from_config(config, device, dtype, run_folder=folder.parent)
    restore_weights(model, folder)
    # the trained parts only: `.to(dtype)` of all would round the frequencies of the rotary embedding too
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def portable_config(config: Config) -> dict[str, Any]:
    """The config as a mapping whose paths work on other machines: relative to the repository, else the bare name."""
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


def fingerprints(model: MMultiModal) -> dict[str, str]:
    """What the trained weights depend on, one hash each: both backbones, the prompt and the image transform."""
    return {
        "visual": backbone_fingerprint(model.visual_folder),
        "llm": backbone_fingerprint(model.llm_folder),
        "prompt": model.chat.fingerprint(),
        "transform": model.transform.fingerprint(),
    }


def save_checkpoint(
    model: MMultiModal,
    folder: Path,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer_state: dict[str, Any],
) -> None:
    """Write a checkpoint folder atomically; if anything fails, an existing folder of that name stays as it was.

    Args:
        folder: final name; its parent exists. An existing checkpoint of that name is replaced.
        provenance: versions, commit, shape of the run; format version, fingerprints and checksums are added here.
        trainer_state: tensors and plain values, for resuming.

    Raises:
        UserError: the disk is full, the parent is gone, or writing is not permitted.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_files(model, temporary, metrics, provenance, trainer_state)
        for file in temporary.rglob("*"):
            flush(file)
        put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"the checkpoint {folder} could not be written ({reason}); earlier checkpoints are as they were. Make room "
            "or restore the folder, then continue with --resume auto"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a half-written folder would keep a full disk full


def _write_files(
    model: MMultiModal,
    folder: Path,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer_state: dict[str, Any],
) -> None:
    (folder / STATE_FILE).parent.mkdir()
    # the embedding is never trained, so peft is told not to look on the hub whether it was resized
    model.LLM.save_pretrained(folder, save_embedding_layers=False)
    adapter_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    adapter_config["base_model_name_or_path"] = portable_config(model.config)["llm"]["path"]  # peft's is absolute
    _write_json(folder / "adapter_config.json", adapter_config)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    projector = {name: tensor.detach().cpu().contiguous() for name, tensor in model.feature_proj.state_dict().items()}
    (folder / PROJECTOR_FILE).write_bytes(save(projector))
    state = io.BytesIO()  # torch.save to a file turns a full disk into a RuntimeError
    torch.save(trainer_state, state)
    (folder / STATE_FILE).write_bytes(state.getbuffer())
    (folder / CONFIG_FILE).write_text(
        yaml.safe_dump(portable_config(model.config), allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    # safetensors gives its files to the owner alone; they get the permissions of the others
    (folder / ADAPTER_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
    _write_json(folder / METRICS_FILE, metrics)
    checksums = {name: checksum(folder / name) for name in (ADAPTER_FILE, PROJECTOR_FILE, STATE_FILE)}
    head = {"format_version": FORMAT_VERSION, "fingerprints": fingerprints(model), "checksums": checksums}
    _write_json(folder / PROVENANCE_FILE, head | provenance)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def read_config(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The config a checkpoint was trained with, with `overrides` by dotted key; errors as `check_complete`."""
    folder = check_complete(folder)
    if report_layout.is_report_checkpoint(folder):
        return report_layout.read_report_config(folder, overrides or {})
    read_provenance(folder)  # first: a newer version may have other keys in its config
    return load_config(folder / CONFIG_FILE, overrides)


def restore_weights(
    model: MMultiModal, folder: Path, other_prompt: bool = False, fresh_lora: bool = False
) -> list[str]:
    """Put LoRA and projector of a checkpoint into `model` and check what they were trained on.

    Args:
        other_prompt: the prompt may differ, because training will adapt to it; for answering it may not.
        fresh_lora: leave LoRA as it is if that of the checkpoint was never trained (a first stage with
            `train.lora_lr: 0`); it may then have other settings.

    Returns:
        A sentence for each of the two that was made use of.

    Raises:
        UserError: another backbone, prompt or transform than in training, other LoRA settings, damaged files, or
            tensors that do not fit.
    """
    notes = []
    folder = check_complete(folder)
    checksums: dict[str, str] = {}
    if report_layout.is_report_checkpoint(folder):
        lora = report_layout.lora_settings(folder)
        adapter, projector = report_layout.read_report_tensors(folder)
        files = ("adapter_model.bin", report_layout.PROJECTOR_FILE)
    else:
        checksums = read_provenance(folder).get("checksums", {})
        _check_fingerprints(model, folder)
        notes += _check_prompt(model, folder, other_prompt)
        lora = _saved_lora(folder / "adapter_config.json")
        files = (ADAPTER_FILE, PROJECTOR_FILE)
        adapter, projector = (_read_tensors(folder / name) for name in files)
    ours = model.config.llm.lora
    untrained = not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    if leave_lora := fresh_lora and untrained:
        notes.append(f"LoRA was never trained in {folder}: only the projector is taken from there")
    elif (ours.r, ours.alpha, set(ours.target_modules)) != (lora["r"], lora["alpha"], set(lora["target_modules"])):
        raise UserError(
            f"'llm.lora' differs from the adapter in {folder}: that has r={lora['r']}, alpha={lora['alpha']}, "
            f"target_modules={sorted(lora['target_modules'])}"
        )
    own = {name.replace(".default", ""): tensor for name, tensor in model.LLM.named_parameters() if "lora_" in name}
    trained = [] if leave_lora else [(own, adapter, files[0])]
    trained += [(dict(model.feature_proj.named_parameters()), projector, files[1])]
    for parameters, tensors, name in trained:
        _check_shapes(parameters, tensors, folder / name)
    altered = [problem for name in files if name in checksums and (problem := changed(folder, name, checksums))]
    if altered:
        raise UserError(f"{folder} is damaged: {'; '.join(altered)}. Copy it again or use another checkpoint")
    with torch.no_grad():
        for parameters, tensors, _ in trained:
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    return notes


def _saved_lora(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {"r": saved["r"], "alpha": saved["lora_alpha"], "target_modules": saved["target_modules"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): copy it again or use another checkpoint") from error


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut short ({error}): copy it again or use another checkpoint") from error
    except OSError as error:
        raise file_error(error, file) from error


def _check_fingerprints(model: MMultiModal, folder: Path) -> None:
    expected = read_provenance(folder)["fingerprints"]
    places = {"visual": ("visual.path", model.visual_folder), "llm": ("llm.path", model.llm_folder)}
    for part, (key, backbone) in places.items():
        if not same_backbone(backbone, expected[part]):
            raise UserError(
                f"{folder} was trained on another '{key}': its backbone has the fingerprint {expected[part]}, "
                f"{backbone} has {backbone_fingerprint(backbone)}. Set {key}=FOLDER to the model it was trained with"
            )
    if model.transform.fingerprint() != expected["transform"]:
        raise UserError(f"{folder} was trained with other preprocessor settings than {model.visual_folder} has now")


def _check_prompt(model: MMultiModal, folder: Path, may_differ: bool) -> list[str]:
    if model.chat.fingerprint() == read_provenance(folder)["fingerprints"]["prompt"]:
        return []
    if may_differ:
        return [f"{folder} was trained with another prompt than this run's, to which training will adapt it"]
    raise UserError(f"{folder} was trained with another prompt: leave prompt.* as in its {CONFIG_FILE}")


def _check_shapes(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], file: Path) -> None:
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
