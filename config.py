"""The typed schema of a run: every key of `config.yaml`, its type, its default and its bounds.

All scripts call `load_config(path, overrides)`. For a wrong file, the error has one sentence per mistake with the key,
the reason and the nearest valid name. Each script checks itself that the files it needs exist (`existing_path`).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from config_file import parse_overrides, put_in, read_mapping
from config_messages import explain, key_paths
from errors import UserError, shortened

IMAGE_TAG = "<|extra_0|>"  # placeholder of the photo in questions; a spare token of Qwen v1, as in the report
MISTAKES = 3  # most mistakes in one message

# Steps, samples, tokens: the limit is above any real run, and a product of two counts still fits 64 bits.
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's generators take 64 bits
LearningRate = Annotated[float, Field(le=1e3)]  # training diverges above 1; more is for experiments
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN and infinity are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class Source(Section):
    name: str = Field(min_length=1)
    format: Literal["ai_challenger", "llava", "jsonl", "coco_captions", "vqav2", "webdataset"]
    annotations: str
    images: str
    questions: str | None = None  # vqav2 keeps its questions in a second file
    weight: float = Field(1.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _questions_only_for_vqav2(self) -> "Source":
        if (self.format == "vqav2") != (self.questions is not None):
            raise ValueError("'questions' names the question file of format vqav2: give it there and nowhere else")
        return self


class Data(Section):
    sources: list[Source] = Field(default_factory=list)
    image_map: str = "data/image_map.json"
    captions: str = "data/captions.json"
    seed: Seed = 0
    val_fraction: float = Field(0.02, ge=0, lt=1)
    check_images: Literal["none", "exists", "open"] = "exists"
    max_rejected: float = Field(0.01, ge=0, le=1)
    cache_features: bool = False
    feature_cache: str = "data/features"
    max_length: int = Field(2048, ge=16, le=2**20)
    answers: Literal["one", "all"] = "one"
    augment: list[Literal["blur", "noise", "occlusion", "jpeg", "light", "rotation"]] = Field(default_factory=list)

    @field_validator("augment")
    @classmethod
    def _each_kind_once(cls, kinds: list[str]) -> list[str]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind is named twice: name each once, all are drawn equally often")
        return kinds

    @model_validator(mode="after")
    def _cached_features_cannot_change(self) -> "Data":
        if self.augment and self.cache_features:
            raise ValueError(
                "with 'cache_features' each photo is encoded once, so 'augment' could not change it: "
                "set cache_features: false or augment: []"
            )
        return self

    @model_validator(mode="after")
    def _source_names_differ(self) -> "Data":
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sources are called '{twice[0]}': give each its own name")
        return self


class Prompt(Section):
    system: str = "You are a helpful assistant."
    question_prefix: str = ""
    image_first: bool = False
    newline_before_text: bool = False
    end_token: Literal["<|im_end|>", "<|endoftext|>"] = "<|im_end|>"


class Lora(Section):
    r: int = Field(64, ge=1, le=4096)  # the width of a 7B model: a larger rank is not low
    alpha: int = Field(128, ge=1, le=2**16)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] | None = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


VISUAL_LORA = {"r": 16, "alpha": 32, "target_modules": None}  # an encoder is smaller, its layers have other names


class Visual(Section):
    path: str
    drop: Literal["first", "leading", "none"] = "first"
    feature: Literal["output", "last", "penultimate"] = "output"
    tiles: int = Field(0, ge=0, le=64)
    image_tokens: int | None = Field(None, ge=1, le=2**20)
    lora: Lora = Field(default_factory=lambda: Lora.model_validate(VISUAL_LORA))

    @field_validator("lora", mode="before")
    @classmethod
    def _defaults_of_an_encoder(cls, lora: Any) -> Any:
        return VISUAL_LORA | lora if isinstance(lora, dict) else lora


class Llm(Section):
    path: str
    quantization: Literal["none", "nf4", "int8"] = "none"
    device_map: Literal["auto"] | None = None
    lora: Lora = Field(default_factory=Lora)


class Projector(Section):
    kind: str = Field("mlp", min_length=1)  # a key of `model.projector.PROJECTORS`; new kinds are added there
    init_std: float = Field(0.01, ge=1e-6, le=10)
    factor: Literal[2, 3] = 3
    mean_share: float | None = Field(None, ge=0, le=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    queries: int = Field(64, ge=1, le=4096)
    heads: int = Field(16, ge=1, le=256)

    @model_validator(mode="after")
    def _no_setting_of_another_kind(self) -> "Projector":
        owners = dict.fromkeys(("factor", "mean_share"), "pixel_shuffle")
        owners |= dict.fromkeys(("queries", "heads"), "resampler")
        for key, kind in owners.items():
            # a checkpoint's config has all keys, so a default value was not chosen; new kinds may use any key
            chosen = getattr(self, key) != type(self).model_fields[key].default
            if chosen and self.kind != kind and self.kind in {"mlp", *owners.values()}:
                raise ValueError(f"'{key}' does nothing with kind: {self.kind}; leave it out or set kind: {kind}")
        return self


class PartSettings(Section):
    """Settings of a trained part; a learning rate of 0 leaves the part unchanged."""

    lr: LearningRate = Field(1e-4, ge=0)


class LlmSettings(PartSettings):
    mode: Literal["lora", "full", "frozen"] = "lora"
    layers: list[int] | None = Field(None, min_length=1)


class VisionSettings(PartSettings):
    lr: LearningRate = Field(1e-5, ge=0)
    mode: Literal["frozen", "lora", "full"] = "frozen"


class Parts(Section):
    """Settings of each part in `model.parts.PARTS`; new parts in that table are accepted too."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PartSettings]

    projector: PartSettings = Field(default_factory=PartSettings)
    llm: LlmSettings = Field(default_factory=LlmSettings)
    vision: VisionSettings = Field(default_factory=VisionSettings)


class Train(Section):
    output_dir: str = "checkpoints/run"
    init_from: str | None = None
    stages: list[dict[str, Any]] = Field(default_factory=list)  # checked by `training/stages.py`
    epochs: Count = 1
    max_steps: Count | None = None
    micro_batch: int | Literal["auto"] = 4
    tokens_per_batch: Count | None = None
    accumulation: Count = 1
    samples_per_step: Count | None = None
    pack_questions: bool = True
    max_questions: Count = 16
    parts: Parts = Field(default_factory=Parts)
    word_alignment: int = Field(0, ge=0, le=10**6)
    contrastive_weight: float = Field(0.0, ge=0, le=1000)
    weight_decay: float = Field(0.0, ge=0, le=10)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)  # the largest value never clips
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    gradient_checkpointing: Literal["auto", "on", "off"] = "off"
    compile: bool = False
    shard: bool = False
    seed: Seed = 0
    workers: int = Field(2, ge=0, le=1024)
    log_steps: Count = 10
    trackers: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(default_factory=lambda: ["tensorboard"])
    eval_steps: Count | None = None
    eval_samples: Count = 64
    save_steps: Count = 500
    save_total_limit: Count = 2

    @field_validator("micro_batch", mode="plain")
    @classmethod
    def _number_or_auto(cls, value: Any) -> int | str:
        if value == "auto" or (type(value) is int and 1 <= value <= 10**9):
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
                "with micro_batch: auto, 'samples_per_step' says how many samples make an optimizer step (and "
                "'accumulation' follows); with a number, 'accumulation' does and 'samples_per_step' is null"
            )
        if self.contrastive_weight > 0 and self.micro_batch in (1, "auto") and self.tokens_per_batch is None:
            raise ValueError("'contrastive_weight' compares the photos of a micro-batch: set micro_batch to 2 or more")
        if self.micro_batch == "auto" and self.tokens_per_batch is not None:
            raise ValueError("'tokens_per_batch' fills micro-batches by itself: set micro_batch to a number")
        return self


class Generate(Section, frozen=True):
    """Decoding settings; cannot be changed, because they travel with each question to an engine that many share."""

    max_new_tokens: int = Field(256, ge=1, le=2**20)
    temperature: float = Field(0.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, le=2**20)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: Seed = 0
    num_beams: int = Field(1, ge=1, le=16)
    length_penalty: float = Field(1.0, ge=0, le=10)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), max_length=16)

    @field_validator("temperature")
    @classmethod
    def _no_division_by_almost_zero(cls, value: float) -> float:
        if 0 < value < 0.01:  # logits divided by a smaller value overflow
            raise ValueError("it should be 0 (always the likeliest token) or at least 0.01")
        return value


class Gui(Section):
    host: str = "127.0.0.1"
    port: int = Field(7860, ge=1, le=65535)
    max_upload_mb: int = Field(20, ge=1, le=10_000)
    cache_mb: int = Field(1024, ge=0, le=2**20)
    cuda_graph: bool = True
    root_path: str = Field("", pattern=r"^(/[^\s/]+)*$|^https?://\S+$")
    user: str | None = Field(None, min_length=1)
    password: str | None = Field(None, exclude=True, repr=False)  # neither in a checkpoint nor in a message


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


class DataConfig(Config):
    """A config for preparing data, which needs no model: `visual` and `llm` may be missing."""

    visual: Visual | None = None
    llm: Llm | None = None


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: relative to the repository root.
        overrides: `key=value` texts of a command line with YAML values, or a dict by dotted key, used unchanged.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type or bad combination; the message names each key.
    """
    return _loaded(Config, path, overrides)


def load_data(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Data:
    """Load the `data` section of a config in which `visual` and `llm` may be missing; else as `load_config`."""
    return _loaded(DataConfig, path, overrides).data


def _loaded(schema: type[S], path: str | Path, overrides: list[str] | dict[str, Any] | None) -> S:
    values = overrides if isinstance(overrides, dict) else parse_overrides(overrides or [])
    return validated(schema, read_mapping(path, values), shortened(path), values)


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Check a mapping against the schema; `where` (a file name) starts the error message."""
    return validated(Config, raw, where)


def changed(section: S, values: dict[str, Any], where: str) -> S:
    """Return a checked copy of `section` in which other values are set; a UserError starts with `where`."""
    return validated(type(section), section.model_dump(exclude_unset=True) | values, where)


def overridden(config: Config, values: dict[str, Any], where: str) -> Config:
    """Return a checked copy of `config` with other values by dotted key; a UserError starts with `where`."""
    put_in(raw := config.model_dump(), values, where)
    return parse_config(raw, where)


def validated(schema: type[S], raw: dict[str, Any], where: str, overrides: Collection[str] = ()) -> S:
    """Check a mapping against `schema`; a UserError starts with `where` and tells which mistakes are in `overrides`."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        items = error.errors()
    except RecursionError:
        raise UserError(f"{where}: sections are nested too deeply") from None
    more = f"; and {len(items) - MISTAKES} more mistakes" if len(items) > MISTAKES else ""
    mistakes = [explain(item, key_paths(Config), overrides) for item in items[:MISTAKES]]
    raise UserError(f"{where}: {'; '.join(mistakes)}{more}")
