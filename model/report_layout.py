"""Read the course report's published checkpoint, which has other files, tensor names and prompt.

    adapter_config.json   LoRA on Qwen v1's fused matrices (peft 0.11)
    adapter_model.bin     its tensors, saved from a GPU
    other_params.bin      the projector
    training_args.bin     a pickled object of the training script; never opened

A pair of LoRA matrices on the fused `c_attn` becomes three pairs, on query, key and value, with the same A. Called by
`model/checkpoint.py`.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from config import Config, load_config
from errors import UserError
from paths import REPO_ROOT

PROJECTOR_FILE = "other_params.bin"
ADAPTER_FILE = "adapter_model.bin"
REQUIRED_FILES = ("adapter_config.json", ADAPTER_FILE, PROJECTOR_FILE)
# Qwen v1's linear layers → Qwen2's; a fused layer lists its parts in row order
LAYERS = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
# prompt of the report's model (from its prompt code), and Qwen-7B-Chat's own repetition penalty
PROMPT = {"system": "你是一位图像理解助手。", "question_prefix": "用中文回答：", "end_token": "<|endoftext|>"}
REPETITION_PENALTY = 1.1
# peft settings that change the meaning of the matrices; the report's adapter does not use them
PLAIN_LORA = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}


def is_report_checkpoint(folder: Path) -> bool:
    """Whether `folder` has the report's layout, complete or not."""
    return (folder / PROJECTOR_FILE).is_file()


def lora_settings(folder: Path) -> dict[str, Any]:
    """Return section `llm.lora` of our config for the adapter in `folder`.

    Raises:
        UserError: not a plain LoRA on Qwen v1's linear layers.
    """
    file = folder / "adapter_config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    for key, value in PLAIN_LORA.items():
        if raw.get(key, value) != value:
            raise UserError(f"{file}: {key}={raw[key]} is not supported, only {value}")
    modules = [new for old, news in LAYERS.items() for new in news if old.rpartition(".")[2] in raw["target_modules"]]
    known = {old.rpartition(".")[2] for old in LAYERS}
    unknown = sorted(set(raw["target_modules"]) - known)
    if unknown or not modules:
        raise UserError(f"{file}: LoRA on {', '.join(unknown) or 'nothing'}; known are {', '.join(sorted(known))}")
    names = [module.rpartition(".")[2] for module in modules]
    return {"r": raw["r"], "alpha": raw["lora_alpha"], "dropout": raw["lora_dropout"], "target_modules": names}


def read_report_config(folder: Path, overrides: dict[str, Any]) -> Config:
    """Load the repository's `config.yaml` (the report's run) with the adapter's base model, LoRA and prompt."""
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    settings = {
        "llm.path": base,
        "llm.lora": lora_settings(folder),
        "generate.repetition_penalty": REPETITION_PENALTY,
        **{f"prompt.{key}": value for key, value in PROMPT.items()},
    }
    return load_config(REPO_ROOT / "config.yaml", settings | overrides)


def read_report_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of the adapter, under the names of Qwen2's layers, and of the projector.

    Raises:
        UserError: a file is not a plain file of tensors, or a tensor has an unknown name.
    """
    adapter = {}
    for name, tensor in _read_bin(folder / ADAPTER_FILE).items():
        *_, layer, block, linear, matrix, _ = parts = name.split(".")
        old = f"{block}.{linear}"
        prefix = ["base_model", "model", "transformer", "h", layer, block, linear, matrix, "weight"]
        if parts != prefix or old not in LAYERS or matrix not in ("lora_A", "lora_B"):
            raise UserError(f"{folder / 'adapter_model.bin'}: '{name}' is not LoRA on a linear layer of Qwen v1")
        news = LAYERS[old]
        pieces = tensor.chunk(len(news)) if matrix == "lora_B" else [tensor] * len(news)
        for new, piece in zip(news, pieces, strict=True):
            adapter[f"base_model.model.model.layers.{layer}.{new}.{matrix}.weight"] = piece
    return adapter, _read_bin(folder / PROJECTOR_FILE)


def _read_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: not a plain file of tensors, nothing of it was run ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: expected named tensors")
    return tensors
