"""Portable form of a run's config for its checkpoints. Called by `model/checkpoint.py`."""

import os
from pathlib import Path
from typing import Any

from config import Config
from paths import REPO_ROOT


def portable_config(config: Config) -> dict[str, Any]:
    """Return the config with portable paths: relative to the repository, or only the name if they are outside it."""
    raw = config.model_dump(mode="json")

    def portable(path: str) -> str:
        absolute = Path(os.path.expanduser(path))  # as `resolve_path`
        if not absolute.is_absolute():
            return path
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
