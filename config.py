"""The typed schema of a run: every key of `config.yaml`, its type, its default and its bounds.

All scripts call `load_config(path, overrides)`. A wrong file gets one sentence per mistake that names the key, what is
wrong and the nearest valid name; nothing is guessed. Whether a file exists is asked by the script that needs it
(`existing_path`), so `predict.py` does not ask for training data.
"""

import argparse
import difflib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

REPO_ROOT = Path(__file__).resolve().parent
IMAGE_TAG = "<|extra_0|>"  # stands for the photo in questions; the report's name, a spare token of Qwen v1


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Source(Section):
    name: str = Field(min_length=1)
    format: Literal["ai_challenger", "llava", "jsonl", "coco_captions", "vqav2"]
    annotations: str
    images: str
    questions: str | None = None  # vqav2 keeps its questions in a second file
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _questions_only_for_vqav2(self) -> "Source":
        if (self.format == "vqav2") != (self.questions is not None):
            raise ValueError("'questions' names the question file of format vqav2: give it there and nowhere else")
        return self


class Data(Section):
    sources: list[Source] = Field(default_factory=list)
    image_map: str = "data/image_map.json"
    captions: str = "data/captions.json"
    seed: int = Field(0, ge=0)
    val_fraction: float = Field(0.02, ge=0, lt=1)
    check_images: Literal["none", "exists", "open"] = "exists"
    cache_features: bool = False
    feature_cache: str = "data/features"
    max_length: int = Field(2048, ge=16)

    @model_validator(mode="after")
    def _source_names_differ(self) -> "Data":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called '{name}': give each its own name")
        return self


class Prompt(Section):
    system: str = "You are a helpful assistant."
    question_prefix: str = ""
    image_first: bool = False
    end_token: Literal["<|im_end|>", "<|endoftext|>"] = "<|im_end|>"


class Visual(Section):
    path: str
    drop_first_token: bool = True
    image_tokens: int | None = Field(None, ge=1)


class Lora(Section):
    r: int = Field(64, ge=1)
    alpha: int = Field(128, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
    )


class Llm(Section):
    path: str
    quantization: Literal["none", "nf4", "int8"] = "none"
    device_map: Literal["auto"] | None = None
    lora: Lora = Field(default_factory=Lora)


class Projector(Section):
    init_std: float = Field(0.01, gt=0)


class Train(Section):
    output_dir: str = "checkpoints/run"
    init_from: str | None = None
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    micro_batch: int | Literal["auto"] = 4
    tokens_per_batch: int | None = Field(None, ge=1)
    accumulation: int = Field(1, ge=1)
    samples_per_step: int | None = Field(None, ge=1)
    pack_questions: bool = True
    max_questions: int = Field(16, ge=1)
    projector_lr: float = Field(1e-4, gt=0)
    lora_lr: float = Field(1e-4, ge=0)  # 0: the projector alone learns
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    gradient_checkpointing: Literal["auto", "on", "off"] = "off"
    attention: Literal["sdpa", "flex"] = "sdpa"
    compile: bool = False
    seed: int = Field(0, ge=0)
    workers: int = Field(2, ge=0)
    log_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    eval_samples: int = Field(64, ge=1)
    save_steps: int = Field(500, ge=1)
    save_total_limit: int = Field(2, ge=1)

    @field_validator("micro_batch", mode="plain")
    @classmethod
    def _number_or_auto(cls, value: Any) -> int | str:
        if value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError("it should be auto or a whole number of samples, at least 1")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _yaml_calls_on_and_off_true_and_false(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _step_in_samples_or_micro_batches(self) -> "Train":
        if (self.micro_batch == "auto") != (self.samples_per_step is not None):
            raise ValueError(
                "with micro_batch: auto, 'samples_per_step' says how many samples make an optimiser step (and "
                "'accumulation' follows); with a number, 'accumulation' does and 'samples_per_step' is null"
            )
        if self.micro_batch == "auto" and self.tokens_per_batch is not None:
            raise ValueError("'tokens_per_batch' fills micro-batches by itself: set micro_batch to a number")
        return self


class Generate(Section):
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)


class Gui(Section):
    host: str = "127.0.0.1"
    port: int = Field(7860, ge=1, le=65535)
    max_upload_mb: int = Field(20, ge=1)


class Config(Section):
    """One run. Sections: model_root, hub, data, prompt, visual, llm, projector, train, generate, gui."""

    model_root: str = "models"
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    data: Data = Field(default_factory=Data)
    prompt: Prompt = Field(default_factory=Prompt)
    visual: Visual
    llm: Llm
    projector: Projector = Field(default_factory=Projector)
    train: Train = Field(default_factory=Train)
    generate: Generate = Field(default_factory=Generate)
    gui: Gui = Field(default_factory=Gui)


def key_paths(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys of the schema in dotted form (`train.output_dir`); items of a list are written `data.sources.0.name`."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            paths += key_paths(inner, f"{prefix}{name}.")
        elif inner == list[Source]:
            paths += key_paths(Source, f"{prefix}{name}.0.")
    return paths


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key=value` overrides (values are YAML), check everything.

    Raises:
        ValueError: missing or malformed file, unknown key, wrong type or bad combination; the message names each key.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise ValueError(f"config file not found: {file}. {nearest_name_hint(file)}Give one with --config FILE")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected sections such as 'data:' and 'train:', found {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Check a mapping against the schema; `where` (a file name) opens the error message."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def parse_overrides(overrides: list[str]) -> dict[str, str]:
    """`["key=value", …]` as a mapping, for `MMultiModal.from_checkpoint`; ValueError for one without `=`."""
    pairs = [override.partition("=") for override in overrides]
    for key, equals, value in pairs:
        if not key or not equals:
            raise ValueError(f"override '{key}{equals}{value}' is not of the form key=value")
    return {key: value for key, _, value in pairs}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override '{override}' is not of the form key=value, for example train.max_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override '{override}': the value is not valid YAML; quote it: {key}='\"…\"'") from error
    node: Any = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node, list):
            if not parent.isdigit() or int(parent) >= len(node):
                raise ValueError(f"override '{key}': item {parent} does not exist, the list has {len(node)}")
            node = node[int(parent)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ValueError(f"override '{key}': '{parent}' is a value, not a section")
    if isinstance(node, list):
        if not leaf.isdigit() or int(leaf) >= len(node):
            raise ValueError(f"override '{key}': item {leaf} does not exist, the list has {len(node)}")
        node[int(leaf)] = value
    else:
        node[leaf] = value


def _explain(item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        parent = ".".join("0" if isinstance(part, int) else str(part) for part in item["loc"][:-1])
        siblings = [path for path in key_paths() if path.rpartition(".")[0] == parent]
        leaf = str(item["loc"][-1])
        near = difflib.get_close_matches(leaf, [path.rpartition(".")[2] for path in siblings], n=1, cutoff=0.5)
        elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == leaf]
        if near:
            hint = f"did you mean '{(parent + '.' if parent else '') + near[0]}'?"
        elif elsewhere:
            hint = f"did you mean '{elsewhere[0]}'?"
        else:
            hint = "valid here: " + ", ".join(path.rpartition(".")[2] for path in siblings)
        return f"unknown key '{key}', {hint}"
    if item["type"] == "missing":
        return f"key '{key}' is missing"
    reason = item["msg"].removeprefix("Value error, ")
    return f"'{key}' = {item['input']!r}: {reason}" if item["type"] != "value_error" else f"'{key}': {reason}"


def resolve_path(path: str | Path) -> Path:
    """A relative path counts from the repository root, whatever the working directory; `~` is expanded."""
    return REPO_ROOT / Path(path).expanduser()


def existing_path(path: str | Path, key: str, kind: Literal["file", "folder"] = "file") -> Path:
    """Resolve `path`, the value of config key `key`.

    Raises:
        ValueError: it does not exist or is not of that kind; names the key and the nearest existing name.
    """
    resolved = resolve_path(path)
    if resolved.is_file() if kind == "file" else resolved.is_dir():
        return resolved
    if resolved.exists():
        raise ValueError(f"'{key}': {resolved} is not a {kind}")
    raise ValueError(f"'{key}': {kind} not found: {resolved}. {nearest_name_hint(resolved)}Change it with {key}=PATH")


def nearest_name_hint(path: Path) -> str:
    """'Did you mean …? ' for a path whose name is misspelt, or which part of it does not exist; '' if unknown."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent, missing = parent.parent, parent
        return f"The folder {missing} does not exist. "
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"Did you mean {parent / near[0]}? " if near else ""


def require_complete(loading_info: dict[str, Any], key: str, folder: Path) -> None:
    """Check what transformers' `from_pretrained(…, output_loading_info=True)` reports; `key` named the folder.

    Raises:
        ValueError: tensors missing, left over or of the wrong shape; lists their names.
    """
    names = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of the wrong shape"}
    problems = [
        f"{meaning}: {_tensor_names(loading_info[name])}" for name, meaning in names.items() if loading_info[name]
    ]
    if problems:
        raise ValueError(
            f"'{key}': the weights in {folder} do not fit their config.json; tensors {'; '.join(problems)}"
        )


def _tensor_names(items: set[str] | set[tuple]) -> str:
    # a tensor of the wrong shape comes as (name, shape in the file, shape the model has)
    names = sorted(
        item if isinstance(item, str) else f"{item[0]} {[*item[1]]} instead of {[*item[2]]}" for item in items
    )
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def script_arguments(description: str, default_config: str | None = "config.yaml") -> argparse.ArgumentParser:
    """The argument parser all scripts share: `--config FILE` (unless the script takes a checkpoint) and overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if default_config is not None:
        parser.add_argument("--config", default=default_config, help=f"YAML file of the run (default {default_config})")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replace config values, for example train.max_steps=100"
    )
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `ValueError` becomes one sentence on stderr and exit status 1, Ctrl-C status 130."""
    # what libraries will do in their next major version is no news for users: requirements.txt pins this one
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character must not end a run
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
