"""The model card of an exported folder: README.md with the hub's head. Called by `export.py` and `write.py`."""

from pathlib import Path
from typing import Any

import orjson
import yaml

from config import Config
from model.model import MMultiModal
from model.portable import portable_config
from paths import resolve_path

METRICS = "metrics.json"
NOT_STATED = "not stated in its folder"
TRAIN_SETTINGS = ("epochs", "max_steps", "word_alignment", "contrastive_weight", "parts", "seed", "precision")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")

STOCK = """This folder is a stock `{stock_class}` in {dtype}:

    from transformers import pipeline

    ask = pipeline("image-text-to-text", model="FOLDER")
    question = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
    print(ask(text=[{{"role": "user", "content": question}}], return_full_text=False)[0]["generated_text"])"""
# vLLM reads `temperature` and `top_k` of generation_config.json, but not `do_sample` and `num_beams`
BEAMS = (
    "vLLM has no beams and would sample: add --override-generation-config '{\"temperature\": 0}' to `vllm serve`, "
    "which then answers greedily"
)
# value of --weights → what the graphs of a quantised folder have
QUANTISED = {
    "int8": "weights in 8 bits",
    "int4": "weights of the language model's layers in 4 bits and all others in 8",
}
GRAPHS = """This folder holds three graphs, {precision}:

| graph | from | to |
|---|---|---|
| `vision_encoder` | `pixel_values` (photos, 3, H, W) | `image_features` (photos, {tokens}, width) |
| `embed_tokens` | `input_ids` (B, T) | `inputs_embeds` (B, T, width) |
| `decoder_model_merged` | `inputs_embeds`, `attention_mask` (B, P + T), `position_ids` (B, T), `past_key_values.*` | \
`logits` (B, 1, vocabulary) of the last position, `present.*` |

P tokens are cached. Tokenizer, chat template and image processor are those of transformers. Write each `<|extra_0|>` of
a prompt {tokens} times, and put the rows of `image_features` at their places in `inputs_embeds`.
generation_config.json has the stop tokens and the tokens that are never generated."""
LLAMA_CPP = """This folder holds two files for llama.cpp: `{model_file}`, the language model with tokenizer, chat
template and decoding settings, and `mmproj.gguf`, encoder and projector in {dtype}.

    llama-server -m {model_file} --mmproj mmproj.gguf

llama.cpp adds a border to photos that are not square, which the model has never seen. Resize each photo to
{height} × {width} pixels before, as preprocessor_config.json says."""
TEXT = """
# {name}

Answers questions about photos. An image encoder looks at a photo, a projector turns what it saw into {tokens} tokens,
and a language model reads them in place of `<|extra_0|>`. {use}

The tokenizer is the stock one: control tokens that users type, such as `<|im_end|>`, are control tokens to it. Remove
them from untrusted text.

## Parts

| part | from | licence | training |
|---|---|---|---|
| image encoder | {visual} | {visual_licence} | {vision_mode} |
| projector | this project | | {projector_mode} |
| language model | {llm} | {llm_licence} | {llm_mode} |

The licences are those of the parts. That of this model follows from them and from the licences of the data.

## Data

{data}

## Settings

{settings}

## Scores

{scores}

## Comparison with the trained model

{comparison}
"""


def card_facts(model: MMultiModal, checkpoint: Path, trained: Config) -> dict[str, Any]:
    """Return what the card says about a loaded checkpoint; `trained` is the config of its training."""
    config, parts = portable_config(trained), trained.train.parts
    modes = {"lora": f"LoRA, rank {trained.llm.lora.r}, merged", "full": "all weights", "frozen": "frozen"}
    llm_mode = modes[parts.llm.mode]
    if parts.llm.layers is not None:
        llm_mode += f"; all weights of the layers {', '.join(map(str, parts.llm.layers))}"
    modes |= {"lora": f"LoRA, rank {trained.visual.lora.r}, merged"}
    return {
        "name": f"{checkpoint.parent.name}, {checkpoint.name}",
        "tokens": model.processor.chat.plan.crop_tokens,
        "dtype": str(model.encoder.dtype).removeprefix("torch."),
        "visual": config["visual"]["path"],
        "visual_licence": licence(model.visual_folder),
        "vision_mode": modes[parts.vision.mode],
        "projector_mode": modes["full" if parts.projector.lr else "frozen"],
        "llm": config["llm"]["path"],
        "llm_licence": licence(model.llm_folder),
        "llm_mode": llm_mode,
        "data": _data(trained),
        "settings": _settings(config, checkpoint),
        "scores": _scores(checkpoint),
    }


def has_beams(folder: Path) -> bool:
    """Whether an exported folder's decoding settings are beams."""
    return _read(folder / "generation_config.json").get("num_beams", 1) > 1


def licence(folder: Path) -> str:
    """Return the licence that a backbone's folder states: `license` in its model card, or the name of a file."""
    card = folder / "README.md"
    if card.is_file():
        pieces = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(pieces) == 3 and not pieces[0].strip():
            try:
                head = yaml.safe_load(pieces[1])
            except yaml.YAMLError:
                head = None
            if isinstance(head, dict) and head.get("license"):
                return str(head.get("license_name") or head["license"])
    return next((f"see its {name}" for name in LICENCE_FILES if (folder / name).is_file()), NOT_STATED)


def write_card(folder: Path, facts: dict[str, Any], report: dict[str, Any]) -> None:
    """Write README.md; `report` is that of the comparison."""
    config = _read(folder / "config.json")
    head: dict[str, Any] = {"library_name": report["format"], "pipeline_tag": "image-text-to-text"}
    model_file, weights = next(folder.glob("model-*.gguf"), None), QUANTISED.get(report["weights"])
    precision = f"with {weights}, computed in {facts['dtype']}" if weights else f"in {facts['dtype']}"
    use = GRAPHS.format(**facts, precision=precision)
    if model_file is not None:
        size = _read(folder / "preprocessor_config.json")["crop_size"]
        use = LLAMA_CPP.format(**facts, model_file=model_file.name, **size)
    if "architectures" in config:
        head["library_name"] = "transformers"
        use = STOCK.format(**facts, stock_class=config["architectures"][0])
        if report["format"] == "llava" and has_beams(folder):
            use += f"\n\nThe answers are searched with beams. {BEAMS}."
    paths = [facts[key] for key in ("visual", "llm")]
    bases = [path for path in paths if path.count("/") == 1 and not resolve_path(path).is_dir()]  # ids of a hub
    if bases:
        head["base_model"] = bases
    questions = report.get("questions", [])
    same = sum(question["same"] for question in questions)
    comparison = "not the same as the trained model: " + "; ".join(report["problems"][:3])
    if report["passed"]:
        program = next(iter(report["versions"]))
        logits = max(question["logits"] for question in questions)
        features = max((question["features"] for question in questions if "features" in question), default=None)
        compared = "" if features is None else f"the features differ by at most {features:.1e} (relative), "
        comparison = (
            f"Loaded with {program} {report['versions'][program]} in a fresh process, on {report['photos']}: "
            f"{same} of {len(questions)} greedy answers are the same, {compared}the logits differ by at most "
            f"{logits:.1e}. `export_report.json` has more."
        )
    text = TEXT.format(**facts, use=use, comparison=comparison)
    front = yaml.safe_dump(head, allow_unicode=True, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front}---\n{text}", encoding="utf-8")


def _data(config: Config) -> str:
    lines = [f"* {source.name} (format `{source.format}`, weight {source.weight:g})" for source in config.data.sources]
    return "\n".join(lines) or "Not stated in the checkpoint."


def _settings(config: dict[str, Any], checkpoint: Path) -> str:
    """The settings that shape the answers, as YAML, and the library versions of the training."""
    train = config["train"]
    shown = {
        "prompt": config["prompt"],
        "visual": {key: config["visual"][key] for key in ("drop", "feature")},
        "train": {key: train[key] for key in TRAIN_SETTINGS},
        "data": {key: config["data"][key] for key in ("val_fraction", "seed", "max_length", "answers", "augment")},
    }
    provenance = _read(checkpoint / "provenance.json")
    if "versions" in provenance:
        shown["versions"] = provenance["versions"]
    text = yaml.safe_dump(shown, allow_unicode=True, sort_keys=False)
    return "".join(f"    {line}\n" for line in text.splitlines()).rstrip()


def _scores(checkpoint: Path) -> str:
    """Loss and steps of the training, and the overall scores of every `eval_*/metrics.json` beside the checkpoint."""
    lines, metrics = [], _read(checkpoint / METRICS)
    for key in ("step", "samples", "loss", "val_loss"):
        if isinstance(metrics.get(key), int | float):
            lines.append(f"| training | {key} | {metrics[key]:.4g} |")
    for file in sorted(checkpoint.glob(f"eval_*/{METRICS}")):
        overall = _read(file).get("passes", {}).get("trained", {}).get("overall", {})
        for key, value in overall.items():
            if isinstance(value, int | float):
                lines.append(f"| {file.parent.name} | {key} | {value:.4g} |")
    table = "\n".join(["| where | what | value |", "|---|---|---|", *lines])
    return table if lines else "None beside the checkpoint; `eval_vqa.py` writes them."


def _read(file: Path) -> dict[str, Any]:
    """Content of a JSON file that may be missing."""
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
