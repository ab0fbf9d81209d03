"""The rules of the house: who may import whom, every config key read somewhere and explained, no stray names."""

import ast
import itertools
from pathlib import Path

import pytest
import yaml

from config import key_paths, load_config
from paths import REPO_ROOT

SCRIPTS = {"process_image", "train", "test_gui", "predict", "eval_vqa", "export"}
BASE = {"config", "config_file", "paths", "cli", "errors"}  # whoever is not one of them may import them all
# package → packages of ours it may import besides itself and the base
ALLOWED = {
    "errors": set(),
    "paths": {"errors"},
    "cli": {"errors"},
    "config_file": {"errors", "paths"},
    "config": {"errors", "paths", "config_file"},
    "visual": set(),
    "qwen": set(),
    "dataset": {"visual", "qwen"},
    "model": {"visual", "qwen"},
    "page": set(),
    "evaluation": {"model", "dataset", "visual", "qwen"},
    "training": {"evaluation", "model", "dataset", "visual", "qwen"},
    "demo": {"evaluation", "model", "dataset", "visual", "qwen"},
    "benchmarks": {"demo", "training", "evaluation", "model", "dataset", "visual", "qwen"},
    "tasks": set(),
} | {script: {"page", "training", "evaluation", "demo", "model", "dataset", "visual", "qwen"} for script in SCRIPTS}


def product_files():
    files = [path for path in REPO_ROOT.rglob("*.py") if not path.relative_to(REPO_ROOT).parts[0].startswith(".")]
    return [path for path in files if path.relative_to(REPO_ROOT).parts[0] != "tests"]


def imported_packages(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.relative_to(REPO_ROOT).as_posix())
def test_import_rule(path):
    relative = path.relative_to(REPO_ROOT)
    package = relative.parts[0].removesuffix(".py")
    assert package in ALLOWED, f"{package} has no place in the house: add it to ALLOWED or move it"
    for imported in set(imported_packages(ast.parse(path.read_text(encoding="utf-8")))):
        if imported in ALLOWED and imported != package and (imported not in BASE or package in BASE):
            assert imported in ALLOWED[package], f"{relative} must not import {imported}"


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.relative_to(REPO_ROOT).as_posix())
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_config_key_is_read():
    attributes = set()
    for path in product_files():
        if path.name != "config.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            attributes |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # image_map and captions are read by a loop over both names
    unread = {path for path in key_paths() if path.rpartition(".")[2] not in attributes}
    assert not unread


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "sources":
            yield prefix + key


def test_config_yaml_shows_and_explains_every_key():
    text = (REPO_ROOT / "config.yaml").read_text(encoding="utf-8")
    shown = set(leaves(yaml.safe_load(text)))
    sections = {path.rpartition(".")[0] for path in key_paths()}
    expected = {path for path in key_paths() if path not in sections and ".sources" not in path}
    assert shown == expected
    for above, line in itertools.pairwise(text.splitlines()):
        key = line.strip().partition(":")[0]
        if key in {path.rpartition(".")[2] for path in expected} and not line.startswith("      "):
            assert "#" in line or above.strip().startswith("#"), f"not explained: {line}"


@pytest.mark.parametrize("file", ["config.yaml", *(f"configs/{path.name}" for path in Path("configs").glob("*.yaml"))])
def test_shipped_configs_are_valid_and_portable(file):
    config = load_config(file)
    paths = [config.visual.path, config.llm.path, config.data.image_map, config.data.captions, config.train.output_dir]
    assert not any(Path(path).is_absolute() for path in paths)
