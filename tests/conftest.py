"""Fixtures that more than one test file uses."""

from pathlib import Path

import hypothesis
import pytest
import torch

from config import REPO_ROOT

torch.set_num_threads(1)  # models of a few thousand weights only lose time in handing work to threads

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def samples_folder() -> Path:
    """Real COCO photos with annotations in both source formats; they are not part of the repository."""
    folder = Path(REPO_ROOT).parent / "shared" / "samples"
    if not folder.is_dir():
        pytest.skip(f"no real-photo samples at {folder}")
    return folder
