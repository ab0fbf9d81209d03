"""Read the YAML of a run as plain Python values and apply overrides. Called by `config.py`."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, file_error, shortened
from paths import nearest_name_hint, resolve_path

# key of an earlier version → current key, and the values that were renamed
RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "visual.drop_first_token": ("visual.drop", {True: "first", False: "none"}),
    "train.projector_lr": ("train.parts.projector.lr", {}),
    "train.lora_lr": ("train.parts.llm.lr", {}),
}
# removed key of an earlier version → the value that is always used now
REMOVED = {"train.attention": "sdpa"}

logger = logging.getLogger(__name__)


def read_mapping(path: str | Path, values: dict[str, Any]) -> dict[str, Any]:
    """Read the sections of a YAML file and set `values` by dotted key; keys of earlier versions are translated.

    Raises:
        UserError: missing or malformed file, or a key below a value that is not a section.
    """
    file = resolve_path(path)
    where = shortened(file)
    if os.path.isdir(file):
        raise UserError(f"{where} is a folder, not a config file. Give one with --config FILE")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = nearest_name_hint(file, "file")
        raise UserError(f"config file not found: {where}. {hint}Give one with --config FILE") from None
    except OSError as error:
        raise file_error(error, file, "give another config with --config FILE") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    raw = _parse_yaml(text, where, "not valid YAML")
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{where}: expected sections such as 'data:' and 'train:', found {found}")
    for section, content in list(raw.items()):
        for name in list(content) if isinstance(content, dict) else ():
            key = f"{section}.{name}"
            if key in RENAMED or key in REMOVED:
                _set_values(raw, _translated({key: raw[section].pop(name)}, where), replace=False)
    put_in(raw, values, "override")
    return raw


def put_in(raw: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """Set values in the sections of a config by dotted key; keys of earlier versions are translated.

    Raises:
        UserError: a key below a value that is not a section; the message starts with `where`.
    """
    _set_values(raw, _translated(values, where), where=where)


def _translated(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the same values under the current keys."""
    now = {}
    for key, value in values.items():
        if key in REMOVED:
            if value != REMOVED[key]:
                logger.warning("%s: '%s' = %s has no effect any more: %s is used", where, key, value, REMOVED[key])
            continue
        if key in RENAMED:
            today, meanings = RENAMED[key]
            value = meanings.get(value, value) if isinstance(value, bool) else value
            logger.warning("%s: '%s' is called '%s' now and means %s", where, key, today, value)
            key = today
        now[key] = value
    return now


def _set_values(raw: dict[str, Any], values: dict[str, Any], replace: bool = True, where: str = "") -> None:
    """Set values by dotted key; UserError if a value exists and `replace` is false."""
    for key, value in values.items():
        if not replace and _has(raw, key):
            old = next(old for old, (today, _) in RENAMED.items() if today == key)
            raise UserError(f"'{old}' is the earlier name of '{key}', and both are given: remove '{old}'")
        _set_value(raw, key, os.fspath(value) if isinstance(value, os.PathLike) else value, where)


def _has(raw: dict[str, Any], key: str) -> bool:
    node: Any = raw
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Parse `["key=value", …]` of a command line into values by dotted key; the values are YAML.

    Raises:
        UserError: an override without `=`, or with a value that is not valid YAML.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"override '{shortened(override)}' is not of the form key=value, for example train.max_steps=100"
            )
        shown = f"{key}=…" if key.rpartition(".")[2] == "password" else override  # a message may stand in a log
        values[key] = _parse_yaml(text, f"override '{shortened(shown)}'", "the value is not valid YAML, quote it")
    return values


def _set_value(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    where = f"{where} '{shortened(key)}'"
    node: Any = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        position: Any = _item(node, parent, where) if isinstance(node, list) else parent
        if isinstance(node, dict) and node.get(position) is None:
            node[position] = {}
        if not isinstance(node[position], dict | list):
            raise UserError(f"{where}: '{shortened(parent)}' is a value, not a section")
        node[position] = copy.copy(node[position])  # by a YAML anchor, it may be another section too
        node = node[position]
    place: Any = _item(node, leaf, where) if isinstance(node, list) else leaf
    node[place] = value


def _item(items: list[Any], index: str, where: str) -> int:
    # isdecimal accepts digits of all scripts; isdigit also accepts '²', which int rejects
    if not index.isdecimal() or len(index) > 9 or int(index) >= len(items):
        raise UserError(f"{where}: item {shortened(index)} does not exist, the list has {len(items)}")
    return int(index)


class _Loader(yaml.SafeLoader):
    """YAML loader that reads dates as text (they may name a folder) and reports the position of invalid values."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # raised by PyYAML, as for '!!int _'
            message = f"{shortened(node.value)!r} cannot be read ({error})"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, where: str, problem: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise UserError(f"{where}: brackets are nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place, lines = "", text.splitlines()
        if mark is not None and mark.line < len(lines) > 1:
            place = f" at line {mark.line + 1}, column {mark.column + 1} ({shortened(lines[mark.line].strip())})"
        raise UserError(f"{where}: {problem}{place}: {' '.join(str(error.problem).split())}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{where}: {problem}: {shortened(' '.join(str(error).split()))}") from error
