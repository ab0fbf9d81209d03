"""Find the folder of a pretrained backbone, check its files and compute its fingerprint.

Called by `model/model.py`. Code from a checkpoint is never run: `*.py` files are not downloaded, and
pickled weights (`*.bin`) are opened as plain tensors or not at all.
"""

import contextlib
import difflib
import hashlib
import importlib
import itertools
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from errors import UserError, file_error, shortened
from paths import nearest_name_hint, resolve_path

# file beside the checkpoints of a run, never in one: folders of its backbones on this machine
BACKBONES_FILE = "backbones.json"
FINGERPRINT_FORM = "v2:"  # prefix of a fingerprint over all tensors; fingerprints of earlier checkpoints have no prefix
# WINDOW bytes are read at the start, middle and end of every tensor, and once per STRIDE bytes of a large one
WINDOW = 1 << 12
STRIDE = 1 << 22
FIRST_FORM_BYTES = 1 << 20  # of each file, covered by a fingerprint of the first form
# weight files in transformers' search order: one file, or an index of the shards
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
QUANTISED_SUFFIX = re.compile(r"-((GPTQ-)?Int[48]|AWQ)$")  # Qwen-7B-Chat-Int4, Qwen2.5-7B-Instruct-GPTQ-Int4

GGUF = (
    "'{key}': {place} holds GGUF, which is not read; get the original model, with config.json, tokenizer files and "
    "*.safetensors"
)


def locate_backbone(
    path: str, model_root: str, key: str, hub: str = "huggingface", run_folder: Path | None = None
) -> Path:
    """Find the local folder of a backbone: `path` itself, a folder of that name under `model_root`, or a hub id.

    Args:
        path: value of config key `key` (`visual.path` or `llm.path`). A hub id has the form `owner/name` and is
            downloaded once (`HF_ENDPOINT` sets a mirror, `HF_HUB_OFFLINE=1` uses only the cache).
        hub: `huggingface` or `modelscope`.
        run_folder: folder of a checkpoint's run; the folders that `remember_backbones` saved there are tried last.

    Raises:
        UserError: not found (the message lists the tried places and three ways to get it), or not a folder of
            complete, unquantised weights.
    """
    candidates = [resolve_path(path), resolve_path(model_root) / path, resolve_path(model_root) / Path(path).name]
    remembered = [] if run_folder is None else _remembered_folder(run_folder, path, key)
    folders = [
        folder for folder in [*candidates, *remembered] if os.path.isdir(folder)
    ]  # accepts names that are too long
    if folders:  # a package of ours may have the same name, so a folder with a config.json comes first
        folder = next((folder for folder in folders if (folder / "config.json").exists()), folders[0])
        _check_kind(folder, path, key)
        _check_weights(folder, key)
        return folder
    for folder in candidates:
        if os.path.isfile(folder) and folder.suffix == ".gguf":
            raise UserError(GGUF.format(key=key, place=folder))
        if os.path.isfile(folder):
            raise UserError(f"'{key}': {folder} is a file; name the folder with config.json and *.safetensors")
    looks_like_hub_id = path.count("/") == 1 and not Path(path).is_absolute() and not path.startswith((".", "~"))
    parent = resolve_path(path).parent
    # an owner may have the name of one of our packages: ModelScope's qwen/, and on a Mac also Qwen/
    if not looks_like_hub_id or (os.path.isdir(parent) and not any(parent.glob("*.py"))):
        places = f"{shortened(candidates[0])} nor {shortened(candidates[-1])}"
        raise UserError(f"'{key}': no folder {places}. {_hint(candidates)}Set it with {key}=FOLDER")
    snapshot_download = _downloader(hub, path, model_root, key)
    # small files first: the weights of a model with an unsupported config.json are not downloaded
    folder = snapshot_download(["*.json", "*.txt", "*.jinja", "*.tiktoken"])
    _check_kind(folder, path, key)
    folder = snapshot_download(["*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = snapshot_download(["pytorch_model*.bin"])
    _check_weights(folder, key)
    return folder


def _hint(candidates: list[Path]) -> str:
    """Return 'Did you mean …? ' with the nearest model folder, or a sentence about the missing parent, or ''."""
    for candidate in reversed(candidates):
        parent = candidate.parent
        models = [file.parent.name for file in parent.glob("*/config.json")] if os.path.isdir(parent) else []
        near = difflib.get_close_matches(candidate.name, models, n=1, cutoff=0.5)
        if near:
            return f"Did you mean {parent / near[0]}? "
    return "" if os.path.isdir(candidates[0].parent) else nearest_name_hint(candidates[0])


def remember_backbones(output_dir: Path, visual_folder: Path, llm_folder: Path) -> None:
    """Save the folders of a run's backbones on this machine, beside its checkpoints.

    A checkpoint has only their names, so backbones outside the usual places could not be found from it.

    Raises:
        UserError: the file cannot be written.
    """
    folders = {"visual.path": visual_folder, "llm.path": llm_folder}
    content = {key: str(folder.absolute()) for key, folder in folders.items()}
    file = output_dir / BACKBONES_FILE
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error(error, file) from error


def _remembered_folder(run_folder: Path, path: str, key: str) -> list[Path]:
    """Return the saved folder of backbone `key`, if `path` is only its name, as in a checkpoint."""
    try:
        folders = json.loads((run_folder / BACKBONES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the file is optional, so it may be missing or damaged
        return []
    folder = folders.get(key) if isinstance(folders, dict) else None
    return [Path(folder)] if isinstance(folder, str) and Path(folder).name == path else []


def _downloader(hub: str, path: str, model_root: str, key: str) -> Callable[[list[str]], Path]:
    """Return a function that downloads the files of hub id `path` by patterns and returns their folder."""
    if hub == "modelscope":
        try:
            library = importlib.import_module("modelscope")
        except ImportError as error:
            raise UserError(
                f"'hub' is modelscope, whose package is not installed: run `pip install modelscope`, or name the "
                f"model's folder with {key}=FOLDER"
            ) from error
    else:
        library = huggingface_hub

    def snapshot_download(patterns: list[str]) -> Path:
        try:
            return Path(library.snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*/*"]))
        except Exception as error:  # without a network, the hubs' libraries raise many types
            raise UserError(
                f"'{key}': '{path}' is neither a folder here nor reachable on the hub {hub} ({type(error).__name__}). "
                "Either set HF_ENDPOINT to a mirror you can reach (or hub=modelscope), or copy the model to "
                f"{resolve_path(model_root) / path}, or name its folder with {key}=FOLDER"
            ) from error

    return snapshot_download


def _check_kind(folder: Path, path: str, key: str) -> None:
    """Raise UserError if a folder is not a pretrained model, or has quantised weights."""
    if (folder / "adapter_config.json").exists():
        projectors = ("feature_proj.safetensors", "other_params.bin")
        if any((folder / name).exists() for name in projectors):
            raise UserError(
                f"'{key}': {folder} is a checkpoint of a trained model; give it with --checkpoint (or "
                f"train.init_from) and name the pretrained model it was trained from with {key}=FOLDER"
            )
        base = _read_object(folder / "adapter_config.json", key).get("base_model_name_or_path")
        raise UserError(f"'{key}': {folder} is a LoRA adapter of {base}; name that model itself, its folder or hub id")
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            raise UserError(GGUF.format(key=key, place=folder))
        raise UserError(
            f"'{key}': {folder} has no config.json, so it is not a model folder (GGUF repositories lack it too)"
        )
    quantisation = _read_object(folder / "config.json", key).get("quantization_config")
    if quantisation is not None:
        original = QUANTISED_SUFFIX.sub("", path.rstrip("/"))
        named = f", for example {original}" if original != path.rstrip("/") else ""
        method = quantisation.get("quant_method", "MLX")  # an MLX config names no method
        raise UserError(
            f"'{key}': {path} holds weights quantised with {method}, which are not read; "
            f"use the original model in fp16 or bf16{named}"
        )


def _read_object(file: Path, key: str) -> dict[str, Any]:
    """Read a JSON file with one object; UserError for other content."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{key}': {file} is not valid JSON ({error}): copy it again") from error
    except OSError as error:
        raise file_error(error, f"'{key}': {file}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{key}': {file} has a {type(content).__name__} and not an object: copy it again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder, including missing shards; empty without a weight file or index.

    Raises:
        UserError: an index that is not a table of shards.
    """
    present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        return []
    if present[0].suffix != ".json":
        return [present[0]]
    try:
        names = set(json.loads(present[0].read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{present[0]} is not a table of shards ({error!r}): copy it again") from error
    return [folder / name for name in sorted(names)]


def _check_weights(folder: Path, key: str) -> None:
    """Raise UserError for weight files that are missing, cut short or not plain tensors; reads only their tables."""
    files = weight_files(folder)
    if not files:
        others = [file.name for kind in ("*.safetensors", "*.bin", "*.gguf") for file in sorted(folder.glob(kind))]
        found = f" (found {', '.join(others)})" if others else ""
        raise UserError(
            f"'{key}': the weights are missing in {folder}{found}: it needs model.safetensors, or its shards and "
            "model.safetensors.index.json, or the same as pytorch_model.bin"
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"'{key}': {file.name}, a shard that the index in {folder} names, is missing: copy it too")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            else:
                torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"'{key}': {file} holds more than tensors, and opening it could run code; it was not opened. Get the "
                "model from its publisher, as *.safetensors if there are any"
            ) from error
        except SafetensorError as error:
            raise UserError(f"'{key}': {file} is damaged or cut short ({error}): copy it again") from error
        except Exception as error:  # for a damaged file, torch.load raises anything from EOFError to KeyError
            raise UserError(f"'{key}': {file} is damaged or cut short ({error!r}): copy it again") from error


def backbone_fingerprint(folder: Path) -> str:
    """Hash over parts of every tensor, to distinguish backbones. A copy in other shards has another hash.

    It reads the tables of names, shapes and offsets, the start, middle and end of each tensor, and a window in every
    4 MiB of a large one. This detects a fine-tuned or merged model and a hole of 4 MiB or more, but not a change of a
    few bytes between two windows. It reads 20 MB of 15 GB at each start; hashing everything would take minutes on a
    slow disk.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = os.path.getsize(file)
        digest.update(json.dumps([file.name, size]).encode())
        with open(file, "rb", buffering=0) as stream:
            table, spans = _safetensors_spans(stream) if file.suffix == ".safetensors" else _bin_spans(file, size)
            digest.update(table)
            for position, length in _windows(spans):
                stream.seek(position)
                digest.update(stream.read(length))
    return FINGERPRINT_FORM + digest.hexdigest()[:16]


def same_backbone(folder: Path, stored: str) -> bool:
    """Whether `folder` holds the backbone whose fingerprint a checkpoint stored.

    Fingerprints of earlier checkpoints cover only the sizes and the first MiB of the files; they are compared in that
    form, with a warning in the log.
    """
    if stored.startswith(FINGERPRINT_FORM):
        return backbone_fingerprint(folder) == stored
    logging.getLogger(__name__).warning(
        "%s was compared by the first MiB of its weight files only: the checkpoint's fingerprint is of an older form",
        folder,
    )
    return _first_fingerprint(folder) == stored


def _first_fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            head = stream.read(FIRST_FORM_BYTES)
        digest.update(json.dumps([file.name, os.path.getsize(file)]).encode())
        digest.update(head)
    return digest.hexdigest()[:16]


def _safetensors_spans(stream: BinaryIO) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the table of a *.safetensors file as stored, and the first byte and last byte + 1 of each tensor."""
    length = int.from_bytes(stream.read(8), "little")
    table = stream.read(length)
    entries = json.loads(table)
    entries.pop("__metadata__", None)
    begin = 8 + length
    return table, sorted(tuple(begin + offset for offset in entry["data_offsets"]) for entry in entries.values())


def _bin_spans(file: Path, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return table and spans of a *.bin file, from its zip records; an old plain pickle is one span."""
    if not zipfile.is_zipfile(file):
        return b"", [(0, size)]
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    table = json.dumps([[record.filename, record.CRC] for record in records]).encode()
    places = sorted(record.header_offset for record in records)
    return table, list(itertools.pairwise([*places, size]))


def _windows(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield position and length of each piece to read.

    A short span is read fully. A longer one is read at start, middle and end, and at least once per `STRIDE` bytes.
    """
    for begin, end in spans:
        pieces = max(2, -(-(end - begin) // STRIDE))  # equally long pieces; each starts with a window
        starts = [begin + (end - begin) * piece // pieces for piece in range(pieces)]
        for position in sorted({*starts, max(begin, end - WINDOW)}):
            yield position, min(WINDOW, end - position)
