"""Origin of a checkpoint: versions, commit, data and settings. Called by `training/build.py`."""

import platform
import subprocess
from typing import Any

import accelerate
import peft
import torch
import transformers

from config import Config
from paths import REPO_ROOT
from training.data import data_hash
from training.state import run_shape


def make_provenance(config: Config) -> dict[str, Any]:
    """Return the origin of a checkpoint: library versions, commit of the code, and the shape of the run."""
    libraries = {"torch": torch, "transformers": transformers, "peft": peft, "accelerate": accelerate}
    return {
        "versions": {"python": platform.python_version()} | {name: lib.__version__ for name, lib in libraries.items()},
        "commit": code_commit(),
        "shape": run_shape(config, data_hash(config)),
    }


def code_commit() -> str | None:
    """Return the commit of this code, with suffix `-dirty` if files differ; None without git or outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False).stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != REPO_ROOT.as_posix():  # unpacked inside another repository
            return None
        commit = git("rev-parse", "--verify", "--quiet", "HEAD")
        return f"{commit}{'-dirty' if git('status', '--porcelain', '--untracked-files=no') else ''}" if commit else None
    except OSError:  # no git on this machine
        return None
