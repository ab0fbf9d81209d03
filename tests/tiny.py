"""Backbones of a few thousand random weights in the public on-disk layouts, and a data set of a few drawn photos."""

import base64
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from config import Config, parse_config
from qwen.tokenizer import QWEN1_PATTERN

IMAGE_SIZE = 56  # 4 × 4 patches of 14 px
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if NO_THINKING %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def fill_trained(model: torch.nn.Module, seed: int = 3) -> None:
    """Fill what is trained at random: LoRA starts at zero, and a projector at N(0, 0.01) hardly shows."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)


def write_tokenizer(folder: Path, thinks: bool = False, merges: tuple[str, ...] = ()) -> int:
    """A byte-level tokenizer in Qwen2's layout, or with Qwen3's think block; returns its size."""
    template = CHATML.replace(
        "NO_THINKING", "enable_thinking is defined and not enable_thinking" if thinks else "false"
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN1_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_tiktoken(folder: Path, size: int) -> None:
    """A `qwen.tiktoken` of `size` tokens: all bytes, then pairs of capital letters, then triples."""
    letters = [bytes([byte]) for byte in range(65, 91)]
    pairs = [first + second for first in letters for second in letters]
    triples = [pair + letter for pair in pairs for letter in letters]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs, *triples][:size]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))


def write_qwen(
    folder: Path, kind: str = "qwen2", tied: bool = True, spare_rows: int = 8, merges: tuple[str, ...] = (), **settings
) -> Path:
    """A Qwen2, Qwen3 or Llama checkpoint with 2 layers of width 32."""
    size = write_tokenizer(folder, thinks=kind == "qwen3", merges=merges)
    torch.manual_seed(1)
    common = {
        "vocab_size": size + spare_rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,  # far from uniform outputs, so that a wrong token shows
    } | settings
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **common))
    model.save_pretrained(folder)
    return folder


QWEN1_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".self_attn.o_proj.": ".attn.c_proj.",
    ".mlp.gate_proj.": ".mlp.w2.",
    ".mlp.up_proj.": ".mlp.w1.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}


def write_qwen1(
    folder: Path, dtype: torch.dtype = torch.float32, shards: int = 2, binary: bool = False, **settings
) -> Qwen2ForCausalLM:
    """A Qwen v1 checkpoint of 2 layers of width 32 in the published layout; returns the same model as a Qwen2."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiktoken(folder, 300)
    raw = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "model_type": "qwen",
        "vocab_size": 300 + 208 + 4,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "seq_length": 1024,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.3,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    } | settings
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"] // 2,
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_attention_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        initializer_range=raw["initializer_range"],
        rms_norm_eps=raw["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Qwen2 starts them at zero, where a wrong order would not show
                parameter.normal_(std=0.3)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".q_proj." in name:
            parts = [model.state_dict()[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensor, name = torch.cat(parts), name.replace("self_attn.q_proj", "attn.c_attn")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for new, old in QWEN1_NAMES.items():
            name = name.replace(new, old)
        tensors[name] = tensor.contiguous()
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    weight_map = {}
    for number in range(shards):
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == number}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        torch.save(part, folder / file) if binary else save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return model


def write_siglip(folder: Path, image_size: int = IMAGE_SIZE, patch_size: int = 14) -> Path:
    """A whole SiglipModel with its text tower, as the public repositories hold it."""
    torch.manual_seed(2)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=text | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1},
        vision_config=vision | {"image_size": image_size, "patch_size": patch_size},
    )
    model = SiglipModel(config)
    with torch.no_grad():  # HF starts with tiny weights; a tower that does nothing could not show an error
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": None,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder


def write_clip(folder: Path, image_size: int = IMAGE_SIZE, patch_size: int = 14) -> Path:
    """A whole CLIPModel with its text tower, as the public repositories hold it."""
    torch.manual_seed(2)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1},
        vision_config=vision | {"image_size": image_size, "patch_size": patch_size},
        projection_dim=8,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    preprocessor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": image_size,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": image_size,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 230),
    "white": (250, 250, 250),
    "black": (0, 0, 0),
    "yellow": (230, 220, 40),
}


def to_bin(folder: Path) -> None:
    """Turn model.safetensors into pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_records(folder: Path, photos: int = 6, questions: int = 3) -> None:
    """Up to six plain photos, each of another colour, and their record files; the last entry has text only."""
    image_map, captions = {}, {}
    for ID in range(photos):
        name, colour = list(COLOURS.items())[ID % len(COLOURS)]
        file = folder / "photos" / f"{ID}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + ID, 50), colour).save(file)
        image_map[f"photos/{ID}.png"] = {"ID": ID, "image_file": file.name, "path": str(file)}
        entries = [
            {"source": "tiny", "q": "<|extra_0|>\nWhich colour?", "a": [name]},
            {"source": "tiny", "q": "<|extra_0|>\nWhich number?", "a": [str(ID)], "type": "number"},
            {
                "source": "tiny",
                "turns": [
                    {"q": "<|extra_0|>\nIs it red?", "a": ["yes" if name == "red" else "no"]},
                    {"q": "Why?", "a": [f"It is {name}."]},
                ],
            },
        ]
        captions[str(ID)] = entries[:questions]
    captions["text"] = [{"source": "tiny", "q": "Say hello.", "a": ["hello"]}]
    (folder / "image_map.json").write_text(json.dumps(image_map), encoding="utf-8")
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


SHORT_RATES = {"projector_lr": "projector", "lora_lr": "llm"}  # for tests, of what stands under train.parts


def tiny_config(folder: Path, **sections) -> Config:
    """The config of a run in `folder`, where the functions above wrote; takes seconds on a CPU."""
    raw = {
        "data": {
            "image_map": str(folder / "image_map.json"),
            "captions": str(folder / "captions.json"),
            "feature_cache": str(folder / "features"),
            "val_fraction": 0.0,
        },
        "visual": {"path": str(folder / "siglip")},
        "llm": {"path": str(folder / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}},
        "train": {
            "output_dir": str(folder / "run"),
            "precision": "float32",
            "micro_batch": 2,
            "workers": 0,
            "max_steps": 4,
            "parts": {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}},
        },
        "generate": {"max_new_tokens": 16},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    rates = {part: raw["train"].pop(key) for key, part in SHORT_RATES.items() if key in raw["train"]}
    parts = raw["train"].get("parts", {})
    raw["train"]["parts"] = parts | {part: parts.get(part, {}) | {"lr": rate} for part, rate in rates.items()}
    return parse_config(raw, "tiny")


def run_config(folder: Path, data: dict | None = None, llm: dict | None = None, **train) -> Config:
    """A config on the backbones and records of `folder`; the plain keywords go into its `train` section."""
    base = tiny_config(folder).model_dump()
    sections = {"train": base["train"] | train, "data": base["data"] | (data or {}), "llm": base["llm"] | (llm or {})}
    return tiny_config(folder, **sections).model_copy(update={"model_root": str(folder)})
