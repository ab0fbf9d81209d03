"""The rules of the house: who may import whom, every config key read somewhere and explained, no stray names."""

import ast
import itertools
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, create_model

from config import Config, load_config
from config_messages import key_paths
from paths import REPO_ROOT
from tests.config_reads import key_fields, read_fields, signatures

SCRIPTS = {"process_image", "train", "test_gui", "serve", "predict", "eval_vqa", "export"}
# every other file may import all of them
BASE = {"config", "config_file", "config_messages", "paths", "cli", "errors", "visual_plan", "batch", "compat"}
# package → packages of ours it may import besides itself and the base
ALLOWED = {
    "errors": set(),
    "visual_plan": set(),
    "batch": set(),
    "compat": set(),
    "paths": {"errors"},
    "cli": {"errors"},
    "config_file": {"errors", "paths"},
    "config_messages": {"errors"},
    "config": {"errors", "paths", "config_file", "config_messages"},
    "visual": set(),
    "qwen": set(),
    "dataset": {"visual", "qwen"},
    "backbones": set(),
    "model": {"visual", "qwen", "backbones"},
    "answering": {"model", "dataset", "visual", "qwen"},
    "exporting": {"model", "dataset", "visual", "qwen"},
    "page": {"answering", "model", "visual", "qwen"},
    "serving": {"answering", "visual"},
    "evaluation": {"answering", "model", "dataset", "visual", "qwen"},
    "training": {"evaluation", "answering", "model", "dataset", "visual", "qwen", "backbones"},
    "demo": {"evaluation", "answering", "model", "dataset", "visual", "qwen"},
    # scripts, since what is fuzzed or measured is the script itself
    "benchmarks": {
        "process_image",
        "backbones",
        "export",
        "exporting",
        "demo",
        "training",
        "evaluation",
        "answering",
        "model",
        "dataset",
        "visual",
        "qwen",
    },
    "tasks": set(),
}
ALLOWED |= dict.fromkeys(SCRIPTS, set(ALLOWED) - BASE - {"benchmarks", "tasks"})


def all_files():
    """Python files of the repository; folders with a dot (a virtual environment) are left out."""
    files = sorted(REPO_ROOT.rglob("*.py"))
    return [path for path in files if not path.relative_to(REPO_ROOT).parts[0].startswith(".")]


def product_files():
    return [path for path in all_files() if path.relative_to(REPO_ROOT).parts[0] != "tests"]


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


def import_edges(trees):
    """Module → modules of ours that it names in an import, anywhere: in functions and for type checkers too."""
    edges = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                package = name.split(".")[: -node.level] if node.level else []
                module = ".".join([*package, node.module])
                edges[name] |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        edges[name] &= trees.keys()
    return edges


def circles(edges):
    """Sets of modules that reach each other."""

    def reached(start):
        found, open_ends = set(), [start]
        while open_ends:
            for module in edges[open_ends.pop()] - found:
                found.add(module)
                open_ends.append(module)
        return found

    all_reached = {module: reached(module) for module in edges}
    return {
        frozenset(other for other in all_reached if other in all_reached[module] and module in all_reached[other])
        for module in edges
        if module in all_reached[module]
    }


def test_no_import_circles_between_files():
    trees = {
        ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in product_files()
    }
    assert circles(import_edges(trees)) == set()


def test_a_circle_is_found_in_functions_and_among_type_imports():
    texts = {
        "room.a": "from room import b",
        "room.b": "def f():\n    import room.c",
        "room.c": "if TYPE_CHECKING:\n    from room.a import X\nimport room.d",
        "room.d": "import os",
    }
    edges = import_edges({name: ast.parse(text) for name, text in texts.items()})
    assert circles(edges) == {frozenset({"room.a", "room.b", "room.c"})}


def test_no_two_classes_have_one_name():
    places = {}
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(REPO_ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


LONGEST_FILE, LONGEST_FUNCTION = 350, 60  # lines
LONG_FILES = {
    "tests/dataset/test_raw.py": "tests of five formats",
    "tests/model/test_projector.py": "tests of three kinds",
    "tests/test_page.py": "one server and one browser for all tests of the chat",
    "tests/visual/test_transform.py": "tests of every kind of image file",
}
LONG_FUNCTIONS = {
    "tests/tiny.py:write_qwen1": "one checkpoint layout, written out",
}


def long_functions(tree):
    """Functions of more lines than allowed whose docstring gives no reason in the agreed form."""
    reason = re.compile(rf"Longer than {LONGEST_FUNCTION} lines because \w")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.end_lineno - node.lineno >= LONGEST_FUNCTION and not reason.search(ast.get_docstring(node) or ""):
            yield node.name


@pytest.mark.parametrize("path", all_files(), ids=lambda path: path.relative_to(REPO_ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text, name = path.read_text(encoding="utf-8"), path.relative_to(REPO_ROOT).as_posix()
    assert (text.count("\n") > LONGEST_FILE) == (name in LONG_FILES), "too long, or an exception no longer needed"
    excepted = {key for key in LONG_FUNCTIONS if key.startswith(f"{name}:")}
    assert {f"{name}:{function}" for function in long_functions(ast.parse(text))} == excepted


def test_exceptions_name_files_that_are_there():
    names = {path.relative_to(REPO_ROOT).as_posix() for path in all_files()}
    assert {*LONG_FILES, *(key.partition(":")[0] for key in LONG_FUNCTIONS)} <= names


def test_a_long_function_is_found_unless_it_gives_its_reason():
    body = "\n".join(["    pass"] * 60)
    assert list(long_functions(ast.parse(f"def f():\n{body}"))) == ["f"]
    assert list(long_functions(ast.parse(f'def f():\n    """F. Longer than 60 lines because x."""\n{body}'))) == []
    assert list(long_functions(ast.parse("def f():\n" + "\n".join(["    pass"] * 59)))) == []


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.relative_to(REPO_ROOT).as_posix())
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def unread_keys(schema, sources):
    loaders = signatures(ast.parse((REPO_ROOT / "config.py").read_text(encoding="utf-8")))
    reads = read_fields([*map(ast.parse, sources), loaders], schema)
    return {key for key, field in key_fields(schema).items() if field not in reads}


def sources():
    """Texts of what reads a config: the product without the schema itself, and without the benchmarks."""
    files = [
        path for path in product_files() if path.relative_to(REPO_ROOT).parts[0] not in ("config.py", "benchmarks")
    ]
    return [path.read_text(encoding="utf-8") for path in files]


def test_every_config_key_is_read():
    assert unread_keys(Config, sources()) == set()


# that many other things have too
NAMES = ["seed", "path", "name", "r", "weight", "dropout", "compile", "host", "images", "size"]


def test_a_key_that_nothing_reads_is_found_in_every_section():
    planted, copies = {name: set() for name in NAMES}, {}

    def plant(section, prefix):
        """A copy of a section, with a key of each name."""
        fields = {}
        for field, info in section.model_fields.items():
            inner = next((part for part in (info.annotation, *get_args(info.annotation)) if is_section(part)), None)
            if inner is not None:
                copy = plant(inner, f"{prefix}{field}.")
                fields[field] = (list[copy] if get_args(info.annotation) else copy, None)
        for name in set(NAMES).difference(section.model_fields):
            fields[name] = (int, 0)
            planted[name].add(prefix + name)
        # a section that stands at two places is one class in the copy too
        return copies.setdefault(section, create_model(section.__name__, __base__=section, **fields))

    def is_section(part):
        return isinstance(part, type) and issubclass(part, BaseModel)

    schema = plant(Config, "")
    assert min(map(len, planted.values())) > 5
    # `train.parts` is read as a whole; a part that the table of parts lacks is an error when a run starts
    parts = {f"train.parts.{name}" for name in NAMES}
    assert unread_keys(schema, sources()) == set().union(*planted.values()) - parts


READING = """
def main(arguments):
    config = load_config("x")
    for source in enumerate(config.data.sources):
        print(source.weight)
    Thing(config.train).run()
    other.seed, model.visual.path, captions.images
    data = load_config("y").data
    print(data.seed)

def load_config(path: str) -> Config: ...

class Thing:
    def __init__(self, train: "Train | None") -> None:
        self.settings = train

    def run(self):
        rate, steps = self.settings.warmup_ratio, self.settings.max_steps
        self.settings.epochs = 1
"""


def test_reads_are_followed_through_names_loops_and_attributes():
    reads = read_fields([ast.parse(READING)], Config)
    assert {f"{section.__name__}.{field}" for section, field in reads} == {
        "Config.data", "Data.seed", "Data.sources", "Source.weight", "Config.train", "Train.warmup_ratio",
        "Train.max_steps"
    }  # fmt: skip


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "sources":
            yield prefix + key


def test_config_yaml_shows_and_explains_every_key():
    text = (REPO_ROOT / "config.yaml").read_text(encoding="utf-8")
    shown = set(leaves(yaml.safe_load(text)))
    sections = {path.rpartition(".")[0] for path in key_paths(Config)}
    expected = {path for path in key_paths(Config) if path not in sections and ".sources" not in path}
    assert shown == expected
    for above, line in itertools.pairwise(text.splitlines()):
        key = line.strip().partition(":")[0]
        if key in {path.rpartition(".")[2] for path in expected} and not line.startswith("      "):
            assert "#" in line or above.strip().startswith("#"), f"not explained: {line}"


SHIPPED = ["config.yaml", *(f"configs/{path.name}" for path in sorted((REPO_ROOT / "configs").glob("*.yaml")))]


@pytest.mark.parametrize("file", SHIPPED)
def test_shipped_configs_are_valid_and_portable(file):
    config = load_config(file)
    paths = [config.visual.path, config.llm.path, config.data.image_map, config.data.captions, config.train.output_dir]
    assert not any(Path(path).is_absolute() for path in paths)


def test_shipped_configs_are_found_wherever_the_tests_run():
    assert "configs/demo.yaml" in SHIPPED
