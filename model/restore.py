"""Put the trained weights of a checkpoint into a model, after checking that they belong there.

`model/checkpoint.py` calls it for answering, `training/build.py` for a resumed run and for `train.init_from`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbones.backbone import backbone_fingerprint, same_backbone
from config import Config
from errors import UserError, file_error
from model import report_layout, stock_folder
from model.checkpoint_folder import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    changed,
    check_complete,
    read_config,
    read_provenance,
    required_files,
)
from model.model import MMultiModal
from model.parts import ADAPTER_FILE, PROJECTOR_FILE, Part


def restore_weights(model: MMultiModal, folder: Path, other_prompt: bool = False, new_run: bool = False) -> list[str]:
    """Load the trained parts of a checkpoint into `model`; check what they belong to.

    Args:
        other_prompt: allow another prompt or `visual.drop`, because training adapts to it; answering needs the same.
        new_run: a part that is missing in the checkpoint, or has an untrained LoRA there (`lr: 0`), keeps its weights
            in `model`; such a LoRA may have other settings.

    Returns:
        One sentence for each of these permissions that was used.

    Raises:
        UserError: another backbone, prompt or transform than in training, other settings of the features or of LoRA,
            weights without a part in this run, damaged files, or tensors that do not fit.
    """
    notes = []
    folder = check_complete(folder)
    checksums: dict[str, str] = {}
    if stock_folder.is_stock_folder(folder):
        stock_folder.check_run(model, folder)
    elif not report_layout.is_report_checkpoint(folder):
        checksums = read_provenance(folder).get("checksums", {})
        _check_fingerprints(model, folder)
        _check_features(model, folder)
        # another drop changes the number of tokens, which is a part of the prompt
        notes += _check_drop(model, folder, other_prompt) or _check_prompt(model, folder, other_prompt)
    saved = _read_weights(folder)
    taken = []
    for part in model.parts:
        weights = saved.pop(part.file, None)
        if new_run and (weights is None or weights.untrained_lora):
            notes.append(f"'{part.name}' was never trained in {folder} and begins anew")
        elif weights is None:
            raise UserError(f"{folder} holds no '{part.name}' ({part.file}): leave train.parts as in its {CONFIG_FILE}")
        else:
            _check_lora(part, weights.lora, folder)
            taken.append((part.parameters, weights))
    left_over = [weights.file for weights in saved.values() if not weights.untrained_lora]
    if left_over:
        raise UserError(
            f"{folder} holds trained weights that this run has no part for ({', '.join(left_over)}): set train.parts "
            f"as in its {CONFIG_FILE}; a learning rate of 0 leaves a part as it is"
        )
    # adapters first: their names and shapes give the clearest error for a different language model
    for parameters, weights in sorted(taken, key=lambda item: item[1].lora is None):
        _check_shapes(parameters, weights.tensors, folder / weights.file)
    files = [weights.file for _, weights in taken if weights.file in checksums]
    altered = [problem for name in files if (problem := changed(folder, name, checksums))]
    if altered:
        raise UserError(f"{folder} is damaged: {'; '.join(altered)}. Copy it again or use another checkpoint")
    with torch.no_grad():
        for parameters, weights in taken:
            for name, parameter in parameters.items():
                parameter.copy_(weights.tensors[name])
    return notes


@dataclass
class _Weights:
    """Content of one weight file of a checkpoint.

    Attributes:
        file: file name.
        tensors: tensors by name.
        lora: settings of an adapter; None for other weights.
    """

    file: str
    tensors: dict[str, torch.Tensor]
    lora: dict[str, Any] | None

    @property
    def untrained_lora(self) -> bool:
        """Whether this is an adapter whose B matrices are all zero, as at initialisation."""
        factors = [tensor for name, tensor in self.tensors.items() if "lora_B" in name]
        return bool(factors) and not any(tensor.any() for tensor in factors)


def _read_weights(folder: Path) -> dict[str, _Weights]:
    """Read the weight files of a checkpoint, by their names in our layout."""
    if report_layout.is_report_checkpoint(folder):
        adapter, projector = report_layout.read_report_tensors(folder)
        return {
            ADAPTER_FILE: _Weights(report_layout.ADAPTER_FILE, adapter, report_layout.lora_settings(folder)),
            PROJECTOR_FILE: _Weights(report_layout.PROJECTOR_FILE, projector, None),
        }
    if stock_folder.is_stock_folder(folder):
        return {PROJECTOR_FILE: _Weights("projector", stock_folder.read_stock_projector(folder), None)}
    weights = {}
    for name in required_files(folder):
        if name.endswith(".safetensors"):
            adapter = Path(name).name == ADAPTER_FILE
            settings = _saved_lora((folder / name).with_name(ADAPTER_CONFIG_FILE)) if adapter else None
            weights[name] = _Weights(name, _read_tensors(folder / name), settings)
    return weights


def _check_lora(part: Part, saved: dict[str, Any] | None, folder: Path) -> None:
    if part.lora is None or saved is None:
        return
    ours = (part.lora.r, part.lora.lora_alpha, set(part.lora.target_modules or ()))
    if ours != (saved["r"], saved["alpha"], set(saved["target_modules"])):
        key = "llm.lora" if part.file == ADAPTER_FILE else "visual.lora"
        raise UserError(
            f"'{key}' differs from the adapter in {folder}: that has r={saved['r']}, alpha={saved['alpha']}, "
            f"target_modules={sorted(saved['target_modules'])}"
        )


def _saved_lora(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {"r": saved["r"], "alpha": saved["lora_alpha"], "target_modules": saved["target_modules"]}
    except OSError as error:
        raise file_error(error, file) from error
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
    if model.processor.transform.fingerprint() != expected["transform"]:
        raise UserError(f"{folder} was trained with other preprocessor settings than {model.visual_folder} has now")


def _check_features(model: MMultiModal, folder: Path) -> None:
    """Compare the settings that change what the same weights compute; most of them change no shape."""
    trained, own = (_feature_settings(config) for config in (read_config(folder), model.config))
    different = [f"{key}={value}" for key, value in trained.items() if own[key] != value]
    if different:
        raise UserError(f"{folder} was trained with {' '.join(different)}: set it so")


def _feature_settings(config: Config) -> dict[str, Any]:
    values = config.projector.model_dump(exclude={"init_std", "dropout"})
    if values["mean_share"] is None:
        values["mean_share"] = 1 / config.projector.factor  # the default, as PixelShuffle's
    return {"visual.feature": config.visual.feature} | {f"projector.{key}": value for key, value in values.items()}


def _check_drop(model: MMultiModal, folder: Path, may_differ: bool) -> list[str]:
    drop = read_config(folder).visual.drop
    if model.encoder.dropped_by(drop) == model.encoder.dropped:
        return []
    if may_differ:
        return [f"{folder} was trained with visual.drop={drop}, and training will adapt it to {model.encoder.drop}"]
    raise UserError(f"{folder} was trained with visual.drop={drop}: set it so")


def _check_prompt(model: MMultiModal, folder: Path, may_differ: bool) -> list[str]:
    if model.processor.chat.fingerprint() == read_provenance(folder)["fingerprints"]["prompt"]:
        return []
    if may_differ:
        return [f"{folder} was trained with another prompt than this run's, to which training will adapt it"]
    raise UserError(
        f"{folder} was trained with another prompt: leave prompt.* as in its {CONFIG_FILE}, and visual.image_tokens"
    )


def _check_shapes(parameters: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor], file: Path) -> None:
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
