"""The typed schema of a run: every key of `config.yaml`, its type, its default and its bounds.

All scripts call `load_config(path, overrides)`. A wrong file gets one sentence per mistake that names the key, what is
wrong and the nearest valid name; nothing is guessed. Whether a file exists is asked by the script that needs it
(`existing_path`), so `predict.py` does not ask for training data.
"""

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from errors import UserError, shortened
from paths import nearest_name_hint, resolve_path

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
    max_rejected: float = Field(0.01, ge=0, le=1)
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
    trackers: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(default_factory=lambda: ["tensorboard"])
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


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        overrides: `key=value` texts of a command line, whose values are YAML, or values by dotted key, taken as they
            are.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type or bad combination; the message names each key.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise UserError(f"config file not found: {file}. {nearest_name_hint(file)}Give one with --config FILE")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected sections such as 'data:' and 'train:', found {type(raw).__name__}")
    values = overrides if isinstance(overrides, dict) else parse_overrides(overrides or [])
    for key, value in values.items():
        _set_value(raw, key, os.fspath(value) if isinstance(value, os.PathLike) else value)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Check a mapping against the schema; `where` (a file name) opens the error message."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["key=value", …]` of a command line as values by dotted key; the values are YAML.

    Raises:
        UserError: one without `=`, or whose value is not valid YAML.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"override '{shortened(override)}' is not of the form key=value, for example train.max_steps=100"
            )
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"override '{shortened(override)}': the value is not valid YAML; quote it: {key}='\"…\"'"
            ) from error
    return values


def _set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    node: Any = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node, list):
            if not parent.isdigit() or int(parent) >= len(node):
                raise UserError(f"override '{key}': item {parent} does not exist, the list has {len(node)}")
            node = node[int(parent)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise UserError(f"override '{key}': '{parent}' is a value, not a section")
    if isinstance(node, list):
        if not leaf.isdigit() or int(leaf) >= len(node):
            raise UserError(f"override '{key}': item {leaf} does not exist, the list has {len(node)}")
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
