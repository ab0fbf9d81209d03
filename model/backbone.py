"""Finds the folder of a pretrained backbone and tells one backbone from another. Called by `model/model.py`."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from config import nearest_name_hint, resolve_path

# bytes hashed at the head of each tensor file: its table of names, shapes and offsets, and the first weights
FINGERPRINT_BYTES = 1 << 20


def locate_backbone(path: str, model_root: str, key: str) -> Path:
    """The local folder of a backbone: `path` itself, a folder of that name under `model_root`, or a hub id.

    Args:
        path: value of config key `key` (`visual.path` or `llm.path`). A hub id has the form `owner/name` and is
            downloaded once (`HF_ENDPOINT` names a mirror, `HF_HUB_OFFLINE=1` keeps to what is cached).

    Raises:
        ValueError: not found anywhere; says what was tried and the three ways to get it.
    """
    candidates = [resolve_path(path), resolve_path(model_root) / path, resolve_path(model_root) / Path(path).name]
    folders = [folder for folder in candidates if folder.is_dir()]
    if folders:  # a package of ours may bear the name too, so one with a config.json comes first
        return _checked(next((folder for folder in folders if (folder / "config.json").exists()), folders[0]), key)
    for folder in candidates:
        if folder.is_file():
            raise ValueError(f"'{key}': {folder} is a file; name the folder with config.json and *.safetensors")
    looks_like_hub_id = path.count("/") == 1 and not Path(path).is_absolute() and not path.startswith((".", "~"))
    if not looks_like_hub_id or resolve_path(path).parent.is_dir():
        hint = nearest_name_hint(candidates[0])
        raise ValueError(f"'{key}': no folder {candidates[0]} nor {candidates[-1]}. {hint}Set it with {key}=FOLDER")
    try:
        downloaded = snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"'{key}': '{path}' is neither a folder here nor reachable on the hub ({type(error).__name__}). Either set "
            f"HF_ENDPOINT to a mirror you can reach, or copy the model to {resolve_path(model_root) / path}, or name "
            f"its folder with {key}=FOLDER"
        ) from error
    return _checked(Path(downloaded), key)


def _checked(folder: Path, key: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{key}': {folder} has no config.json, so it is not a model folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{key}': {folder} has no *.safetensors: the weights are missing")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"'{key}': {file} is damaged or cut short ({error}): copy it again") from error
    return folder


def backbone_fingerprint(folder: Path) -> str:
    """Hash that differs between checkpoints: sizes, tensor tables and first weights of every tensor file.

    Reads 1 MiB of each file, so that it costs nothing at 15 GB; a re-sharded copy counts as another checkpoint.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            head = stream.read(FINGERPRINT_BYTES)
        digest.update(json.dumps([file.name, os.path.getsize(file)]).encode())
        digest.update(head)
    return digest.hexdigest()[:16]
