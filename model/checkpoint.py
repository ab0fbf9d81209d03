"""Checkpoint folder of a trained model: saving and loading.

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

`model/parts.py` determines which weight files exist, `model/restore.py` puts them into a model; frozen weights are not
saved. The course report's published checkpoint (`model/report_layout.py`) and stock LLaVA folders
(`model/stock_folder.py`) can be loaded too. A folder is written under a temporary name, flushed to disk and renamed, so
a folder with its final name is complete.
"""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save

from backbones.backbone import backbone_fingerprint
from errors import UserError
from model.checkpoint_folder import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    METRICS_FILE,
    PROVENANCE_FILE,
    STATE_FILE,
    check_complete,
    checksum,
    flush,
    put_in_place,
    read_config,
)
from model.model import MMultiModal
from model.portable import portable_config
from model.precision import answering_weights, pick_device
from model.restore import restore_weights
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
