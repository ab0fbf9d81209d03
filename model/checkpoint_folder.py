"""Files of a checkpoint folder: names, checks for missing or damaged files, and replacement without loss.

`model/checkpoint.py` writes and reads the files; `training/state.py` selects a checkpoint of a run.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import orjson
import yaml

from config import Config, load_config
from errors import UserError, file_error, shortened
from model import report_layout, stock_folder
from model.parts import ADAPTER_FILE, PROJECTOR_FILE
from paths import REPO_ROOT, nearest_name_hint

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"  # beside a file adapter_model.safetensors
STATE_FILE = "trainer_state/state.pt"
# weight files of a checkpoint without checksums
FORMER_FILES = (PROJECTOR_FILE, ADAPTER_FILE)
# 1: no checksums, the position in the data counted in micro-batches. 2: checksums, position in samples. 3: trained
# parts of several kinds, under train.parts in the config
FORMAT_VERSION = 3


def required_files(folder: Path) -> list[str]:
    """List the files needed for answering: config, provenance, and the weights listed in provenance."""
    try:
        weights = [
            name for name in orjson.loads((folder / PROVENANCE_FILE).read_bytes())["checksums"] if name != STATE_FILE
        ]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):  # format 1, or a damaged file
        weights = list(FORMER_FILES)
    adapters = [
        Path(name).with_name(ADAPTER_CONFIG_FILE).as_posix() for name in weights if Path(name).name == ADAPTER_FILE
    ]
    return [CONFIG_FILE, PROVENANCE_FILE, *adapters, *weights]


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a complete folder to its final name; at any time `recover` can restore the old or the new folder."""
    aside = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(temporary, folder)
    flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Clean up after a killed process: delete partial folders, and restore a checkpoint that was being replaced."""
    for aside in output_dir.glob("checkpoint-*.old"):
        final = aside.with_suffix("")
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)
    for temporary in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(folder: Path) -> list[str]:
    """Tell which weights a checkpoint has: 16 digits of the checksum of `provenance.json`, which has theirs.

    Of other folders, which have no such file: of each weight file.
    """
    provenance = folder / PROVENANCE_FILE
    files = [provenance] if provenance.is_file() else sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")])
    return [checksum(file)[:16] for file in files]


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read `provenance.json` of a checkpoint.

    Raises:
        UserError: it is damaged, or a newer version of this code wrote it.
    """
    file = folder / PROVENANCE_FILE
    try:
        provenance = orjson.loads(file.read_bytes())
        fingerprint_names = set(provenance["fingerprints"])
        version = int(provenance.get("format_version", 1))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): use another checkpoint") from error
    except OSError as error:
        raise file_error(error, file) from error
    if fingerprint_names != {"visual", "llm", "prompt", "transform"}:
        raise UserError(f"{file} is damaged (fingerprints of {sorted(fingerprint_names)}): use another checkpoint")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}, this code reads up to {FORMAT_VERSION}: update the code"
        )
    return provenance


def damage(folder: Path) -> list[str]:
    """List the problems that prevent resuming from `folder`, file by file; empty for an intact checkpoint."""
    required = [*required_files(folder), STATE_FILE]
    missing = [name for name in required if not (folder / name).is_file()]
    problems = [f"{name} is missing" for name in missing]
    for name in {name for name in required if name.endswith((CONFIG_FILE, ADAPTER_CONFIG_FILE))} - set(missing):
        try:
            content = yaml.safe_load((folder / name).read_text(encoding="utf-8"))  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            content = None
        if not isinstance(content, dict):
            problems.append(f"{name} is damaged")
    if PROVENANCE_FILE not in missing:
        try:
            checksums = read_provenance(folder).get("checksums", {})
            problems += [problem for name in checksums if (problem := changed(folder, name, checksums))]
        except UserError as error:
            problems.append(str(error))
    return sorted(problems)


def changed(folder: Path, name: str, checksums: dict[str, str]) -> str | None:
    """Return a sentence if a file exists but is unreadable or differs from its saved checksum."""
    try:
        if not (folder / name).is_file() or checksum(folder / name) == checksums[name]:
            return None
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return f"{name} is not what was written (its checksum differs)"


def check_complete(folder: Path) -> Path:
    """Return `folder` if it is a complete checkpoint, or a stock model.

    Raises:
        UserError: it does not exist or lacks files; names them.
    """
    folder = REPO_ROOT / folder
    if not os.path.isdir(folder):  # unlike Path.is_dir, it accepts names that are too long
        raise UserError(f"checkpoint folder not found: {shortened(folder)}. {nearest_name_hint(folder)}".rstrip())
    if stock_folder.is_stock_folder(folder):
        return folder
    in_report = report_layout.is_report_checkpoint(folder)
    required = report_layout.REQUIRED_FILES if in_report else required_files(folder)
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        inside = list_checkpoints(folder)
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(f"{folder} is not a complete checkpoint, it lacks {', '.join(missing)}{hint}")
    return folder


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoint folders of a run, oldest first, without unfinished ones (`.tmp`)."""
    # isdecimal, because isdigit accepts characters that int rejects, such as '²'
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_config(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read the training config of a checkpoint, with `overrides` by dotted key; errors as `check_complete`."""
    folder = check_complete(folder)
    if report_layout.is_report_checkpoint(folder):
        return report_layout.read_report_config(folder, overrides or {})
    if stock_folder.is_stock_folder(folder):
        return stock_folder.read_stock_config(folder, overrides or {})
    read_provenance(folder)  # first: a newer version may have other keys in its config
    config = load_config(folder / CONFIG_FILE, overrides)
    if config.projector.kind == "pixel_shuffle" and "mean_share" not in config.projector.model_fields_set:
        # written before the key, so it was trained with none of the mean
        config = load_config(folder / CONFIG_FILE, {**(overrides or {}), "projector.mean_share": 0.0})
    return config
