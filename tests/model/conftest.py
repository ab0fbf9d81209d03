"""A folder with tiny backbones of all language-model generations, shared by the tests of the model."""

import shutil

import pytest

from tests.tiny import write_qwen, write_qwen1, write_records, write_siglip


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    write_siglip(folder / "siglip")
    write_qwen(folder / "qwen")
    for kind in ("qwen2", "qwen3"):
        for tied in (True, False):
            write_qwen(folder / f"{kind}-{'tied' if tied else 'untied'}", kind, tied)
    write_qwen1(folder / "qwen1")
    write_qwen1(folder / "qwen1-short", seq_length=48)  # dialogues cross this, so positions change on the way
    write_records(folder)
    return folder


@pytest.fixture
def folder(backbones, tmp_path):
    return shutil.copytree(backbones / "qwen", tmp_path / "qwen")
