"""Checkpoint folder of a trained model: saving, loading and checks.

`training/state.py` writes it; every script reads it.

    config.yaml                  the resolved config; names and relative paths, no absolute paths
    feature_proj.safetensors     the projector
    adapter_config.json          LoRA on the language model, in peft's own layout
    adapter_model.safetensors
    llm.safetensors              weights of the language model that were trained whole, if any
    vision_adapter/              LoRA on the encoder, if any, in peft's own layout
    vision.safetensors           weights of the encoder that were trained whole, if any
    provenance.json              format version, checksums, fingerprints of backbones, prompt and transform; library
                                 versions, commit, and settings of the run (data, split, seeds, packing)
    metrics.json                 the last training and validation figures
    trainer_state/               optimizer, scheduler, random generators, position in the data

`model/parts.py` determines which weight files exist; frozen weights are not saved. The course report's published
checkpoint (`model/report_layout.py`) and stock LLaVA folders (`model/stock_folder.py`) can be loaded too. A folder is
written under a temporary name, flushed to disk and renamed, so a folder with its final name is complete.
"""

import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from backbones.backbone import backbone_fingerprint, same_backbone
from errors import UserError, file_error
from model import report_layout, stock_folder
from model.checkpoint_folder import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    PROVENANCE_FILE,
    STATE_FILE,
    changed,
    check_complete,
    checksum,
    flush,
    put_in_place,
    read_config,
    read_provenance,
    required_files,
)
from model.model import MMultiModal
from model.parts import ADAPTER_FILE, PROJECTOR_FILE, Part
from model.portable import portable_config
from model.precision import answering_weights, pick_device
from qwen.half import halve, linear_weights


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overrides: dict[str, Any] | None = None,
    merge_lora: bool = True,
) -> MMultiModal:
    """Load a checkpoint folder for answering.

    Args:
        folder: as `save_checkpoint` wrote it, or the course report's published checkpoint.
        device: default as `model.precision.pick_device`.
        dtype: of all weights that are not quantised; default as `answering_weights`.
        overrides: config values by dotted key, for example `{"llm.path": "/models/Qwen2.5-0.5B"}`; the values are
            used unchanged. Only here, `train.precision` is that of the answers.
        merge_lora: add LoRA to the weights where that loses nothing (`qwen.lora.merge_lora`), so that answers take no
            time for it. False: leave it apart, as in training.

    Raises:
        UserError: not a complete checkpoint, or its backbones are missing or differ from those in training.
    """
    folder = check_complete(Path(folder))
    device = pick_device(device)
    config = read_config(folder, overrides)
    half_from = math.inf
    if dtype is None:
        asked = config.train.precision if "train.precision" in (overrides or {}) else None
        dtype, half_from = answering_weights(asked, device, config.llm.quantization)
    model = MMultiModal.from_config(config, device, dtype, run_folder=folder.parent)
    restore_weights(model, folder)
    # only the parts: `.to(dtype)` on the model would also round the frequencies of the rotary embedding
    for part in model.parts:
        for parameter in part.parameters.values():
            parameter.data = parameter.data.to(dtype)
    if merge_lora:
        model.merge_lora()
    if not isinstance(model.LLM, PeftModel) and linear_weights(model.LLM) >= half_from:
        halve(model.LLM)
        model.drop_stale_parts()
    return model.eval()


def fingerprints(model: MMultiModal) -> dict[str, str]:
    """Hashes of what the trained weights depend on: both backbones, the prompt and the image transform."""
    return {
        "visual": backbone_fingerprint(model.visual_folder),
        "llm": backbone_fingerprint(model.llm_folder),
        "prompt": model.processor.chat.fingerprint(),
        "transform": model.processor.transform.fingerprint(),
    }


def save_checkpoint(
    model: MMultiModal,
    folder: Path,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer_state: dict[str, Any],
) -> None:
    """Write a checkpoint folder atomically; on failure, an existing folder of that name is unchanged.

    Args:
        folder: final name; its parent exists. An existing checkpoint of that name is replaced.
        provenance: versions, commit, settings of the run; format version, fingerprints and checksums are added here.
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
        shutil.rmtree(temporary, ignore_errors=True)  # a partial folder would keep the disk full


def _write_files(
    model: MMultiModal,
    folder: Path,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer_state: dict[str, Any],
) -> None:
    for part in model.parts:
        file = folder / part.file
        file.parent.mkdir(exist_ok=True)
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in part.parameters.items()}
        # safetensors' save_file makes the file readable by its owner only and reports a full disk as another error
        file.write_bytes(save(tensors, metadata={"format": "pt"}))
        if part.lora is not None:
            part.lora.save_pretrained(file.parent)
            settings = json.loads((file.parent / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
            section = "llm" if file.parent == folder else "visual"
            settings["base_model_name_or_path"] = portable_config(model.config)[section]["path"]  # peft's is absolute
            _write_json(file.parent / ADAPTER_CONFIG_FILE, settings)
    (folder / STATE_FILE).parent.mkdir()
    state = io.BytesIO()  # torch.save to a file turns a full disk into a RuntimeError
    torch.save(trainer_state, state)
    (folder / STATE_FILE).write_bytes(state.getbuffer())
    (folder / CONFIG_FILE).write_text(
        yaml.safe_dump(portable_config(model.config), allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    _write_json(folder / METRICS_FILE, metrics)
    checksums = {name: checksum(folder / name) for name in [*(part.file for part in model.parts), STATE_FILE]}
    head = {"format_version": FORMAT_VERSION, "fingerprints": fingerprints(model), "checksums": checksums}
    _write_json(folder / PROVENANCE_FILE, head | provenance)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def restore_weights(model: MMultiModal, folder: Path, other_prompt: bool = False, new_run: bool = False) -> list[str]:
    """Load the trained parts of a checkpoint into `model`; check backbones, prompt and transform.

    Args:
        other_prompt: allow another prompt, because training adapts to it; answering needs the same prompt.
        new_run: a part that is missing in the checkpoint, or has an untrained LoRA there (`lr: 0`), keeps its weights
            in `model`; such a LoRA may have other settings.

    Returns:
        One sentence for each of these permissions that was used.

    Raises:
        UserError: another backbone, prompt or transform than in training, other LoRA settings, weights without a part
            in this run, damaged files, or tensors that do not fit.
    """
    notes = []
    folder = check_complete(folder)
    checksums: dict[str, str] = {}
    if stock_folder.is_stock_folder(folder):
        stock_folder.check_run(model, folder)
    elif not report_layout.is_report_checkpoint(folder):
        checksums = read_provenance(folder).get("checksums", {})
        _check_fingerprints(model, folder)
        notes += _check_prompt(model, folder, other_prompt)
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
    feature = read_config(folder).visual.feature
    if model.config.visual.feature != feature:
        raise UserError(f"{folder} was trained with visual.feature={feature}: set it so")
    if model.processor.transform.fingerprint() != expected["transform"]:
        raise UserError(f"{folder} was trained with other preprocessor settings than {model.visual_folder} has now")


def _check_prompt(model: MMultiModal, folder: Path, may_differ: bool) -> list[str]:
    if model.processor.chat.fingerprint() == read_provenance(folder)["fingerprints"]["prompt"]:
        return []
    if may_differ:
        return [f"{folder} was trained with another prompt than this run's, to which training will adapt it"]
    raise UserError(f"{folder} was trained with another prompt: leave prompt.* as in its {CONFIG_FILE}")


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
