"""Read a stock LLaVA folder: SigLIP or CLIP, an MLP projector and Qwen, as `export.py` writes it and others publish it.

`visual.path` and `llm.path` may both name such a folder; `visual/encoder.py` and `qwen/loading.py` read their part of
it. This file reads the rest: the projector, and the settings that its config and chat template express. Called by
`model/checkpoint.py`, so that scripts take the folder as a checkpoint, and `train.init_from` starts from it.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from safetensors import SafetensorError, safe_open

from backbones.backbone import weight_files
from config import Config, overridden, parse_config
from errors import UserError, shortened
from qwen.loading import LANGUAGE_MODELS
from qwen.tokenizer import load_tokenizer

CONFIG = "config.json"
# number of a layer in LLaVA's config → `visual.feature`
FEATURES = {-1: "last", -2: "penultimate"}
ENCODERS = ("siglip_vision_model", "clip_vision_model")
STRATEGIES = {"default": "first", "full": "none"}  # → `visual.drop`
PROJECTOR = re.compile(r"^(?:model\.)?multi_modal_projector\.")
LAYERS = {"linear_1": "0", "linear_2": "2"}  # of LLaVA's projector → of `model.projector.Mlp`
# a dialogue of one photo, as every template of the form in `qwen/chat.py` renders it
DIALOGUE = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?"
    r"<\|im_start\|>user\n(?P<first>.*?)ONE<\|im_end\|>\n"
    r"<\|im_start\|>assistant\n(?P<think>(?:<think>\n\n</think>\n\n)?)(?P<start>\n?)TWO(?P<end><\|im_end\|>|<\|endoftext\|>)\n"
    r"<\|im_start\|>user\n(?P<prefix>.*?)THREE<\|im_end\|>\n<\|im_start\|>assistant\n(?P=think)",
    re.DOTALL,
)

if TYPE_CHECKING:
    from model.model import MMultiModal


def is_stock_folder(folder: Path) -> bool:
    """Whether `folder` holds a whole model of an image encoder and a language model, of any kind."""
    if not os.path.isfile(folder / CONFIG):
        return False
    try:
        return {"vision_config", "text_config"} <= set(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        return False


def read_stock_settings(folder: Path) -> dict[str, Any]:
    """Return the config values, by dotted key, that a run with the folder's projector needs.

    Raises:
        UserError: a part of the model that is not known here; names it.
    """
    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if raw.get("model_type") != "llava":
        raise UserError(f"{folder} is a model of type '{raw.get('model_type')}': of stock models, only llava is read")
    parts = {"image encoder": ("vision_config", ENCODERS), "language model": ("text_config", LANGUAGE_MODELS)}
    for part, (section, known) in parts.items():
        kind = raw[section].get("model_type")
        if kind not in known:
            raise UserError(f"{folder}: its {part} is of type '{kind}', and only {', '.join(known)} are read")
    layer, strategy = raw.get("vision_feature_layer", -2), raw.get("vision_feature_select_strategy", "default")
    act = raw.get("projector_hidden_act", "gelu")
    if not isinstance(layer, int) or layer not in FEATURES or strategy not in STRATEGIES:
        raise UserError(
            f"{folder}: the rows of its encoder are those of layer {layer}, '{strategy}'; only the layers "
            f"{' and '.join(map(str, FEATURES))} with {' or '.join(STRATEGIES)} are read"
        )
    if act != "gelu" or raw.get("multimodal_projector_bias", True) is not True:
        raise UserError(f"{folder}: its projector has the activation '{act}' or no bias; only gelu with bias is read")
    return {
        "visual.path": str(folder),
        "llm.path": str(folder),
        "visual.feature": FEATURES[layer],
        "visual.drop": STRATEGIES[strategy],
        "projector.kind": "mlp",
    }


def read_stock_config(folder: Path, overrides: dict[str, Any]) -> Config:
    """Return a config for answering with the folder's own parts, prompt and decoding settings, and `overrides`."""
    needed = read_stock_settings(folder)  # first, because an unknown part may have no tokenizer that loads
    settings = {"visual": {"path": str(folder)}, "llm": {"path": str(folder)}, "prompt": read_prompt(folder)}
    settings |= {"generate": _decoding(folder), "train": {"parts": {"llm": {"mode": "frozen"}}}}
    return overridden(parse_config(settings, str(folder)), needed | overrides, str(folder))


def read_stock_projector(folder: Path) -> dict[str, torch.Tensor]:
    """Return the projector's tensors under the names of `model.projector.Mlp`.

    Tensors of no known part are found when the encoder is loaded.

    Raises:
        UserError: weights that are not *.safetensors, or are damaged.
    """
    projector = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            raise UserError(f"{folder}: of stock models, only *.safetensors are read, not {file.name}")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if PROJECTOR.search(name):
                        layer, _, kind = PROJECTOR.sub("", name).partition(".")
                        projector[f"{LAYERS.get(layer, layer)}.{kind}"] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut short ({error}): copy it again") from error
    return projector


def check_run(model: "MMultiModal", folder: Path) -> None:
    """Raise UserError unless a run takes encoder, language model and rows from `folder`, as its projector does."""
    needed = read_stock_settings(folder)
    config, encoder = model.config, model.encoder
    own = (config.visual.feature, encoder.dropped > 0, config.projector.kind)
    wanted = (needed["visual.feature"], needed["visual.drop"] == "first", needed["projector.kind"])
    if own != wanted or not all(path.samefile(folder) for path in (model.visual_folder, model.llm_folder)):
        values = " ".join(f"{key}={value}" for key, value in needed.items())
        raise UserError(
            f"{folder} is a stock model, and its projector belongs to its own encoder and language model: set {values}"
        )


def read_prompt(folder: Path) -> dict[str, Any]:
    """Return section `prompt` of a config by what the folder's chat template renders.

    Raises:
        UserError: not the format of `qwen/chat.py`.
    """
    tokenizer, template = load_tokenizer(folder), _processor_template(folder)
    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    image_id = raw.get("image_token_index", raw.get("image_token_id"))
    if image_id is None:
        raise UserError(f"{folder / CONFIG} has no image_token_index, so the place of a photo is not known")
    tag = tokenizer.convert_ids_to_tokens(image_id)

    def rendered(*contents: Any) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError):  # what a template raises where content is of another kind
            return ""

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    if template is None and tokenizer.chat_template is None:
        raise UserError(f"{folder} has no chat template, so its prompt is not known")
    dialogue = rendered([{"type": "image"}, text("ONE")], [text("TWO")], [text("THREE")])
    found = DIALOGUE.fullmatch(dialogue)
    start, prefix, first = found.group("start", "prefix", "first") if found else ("", "", "")
    own_prefix = prefix.removeprefix(start)
    places = {f"{own_prefix}{tag}\n", f"{tag}\n{own_prefix}"}
    if found is None or start + own_prefix != prefix or first not in places:
        shown = shortened(repr(dialogue)) if dialogue else "nothing for a list of parts"
        raise UserError(
            f"{folder}: its chat template is not the format of qwen/chat.py (ChatML, the photo on a line of its own "
            f"before the question), but writes {shown}: train on from it with train.init_from and a prompt of your "
            "own, or ask a program that reads the template"
        )
    # unless a photo keeps its place in a string, the template moves photos to the front, or takes parts only
    in_place = re.search(rf"BEFORE.*({re.escape(tag)}|<image>)", rendered("BEFORE <image> AFTER"), re.DOTALL)
    return {
        "system": found["system"] or "",
        "question_prefix": own_prefix,
        "image_first": first != f"{own_prefix}{tag}\n" or not (own_prefix or in_place),
        "newline_before_text": start != "",
        "end_token": found["end"],
    }


def _processor_template(folder: Path) -> str | None:
    """Return the processor's chat template; None without one, as the tokenizer may have the language model's own."""
    for name in ("processor_config.json", "chat_template.json"):  # the order of transformers
        file = folder / name
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
        if template is not None:
            return template
    return None


def _decoding(folder: Path) -> dict[str, Any]:
    """Section `generate` of a config from the folder's generation_config.json; sampling only where that samples."""
    file = folder / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    keys = ["max_new_tokens", "repetition_penalty"]
    # sampling among one token is the form in which `export.py` and others write greedy decoding
    if raw.get("do_sample") and raw.get("top_k") != 1:
        keys += ["temperature", "top_p", "top_k", "min_p"]
        raw = {"temperature": 1.0, "top_k": 50} | raw  # transformers' defaults
    elif raw.get("num_beams", 1) != 1:
        keys += ["num_beams", "length_penalty"]
    return {key: raw[key] for key in keys if raw.get(key) is not None}
