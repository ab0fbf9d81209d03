"""Tables of `docs/backbones.md` and `docs/backbones_zh.md`, printed by `python -m benchmarks.backbone_tables`.

The dimensions come from the public config.json of each repository. Parameters are counted on the meta device, which
needs no memory. A test compares the tables with the documents and loads a small model for each row.
"""

import functools
from typing import Any, NamedTuple

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import SiglipVisionConfig as SiglipConfig

from visual.CLIP_VIT import CLIPViT
from visual.SigLIP_VIT import SigLIPViT

GIB = 1 << 30
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIZES = {"base": BASE, "large": LARGE, "so400m": SO400M}
# google/<name>: the name contains size, patch and pixels of config.json
SIGLIP = [
    *(f"siglip-base-patch16-{pixels}" for pixels in (224, 256, 384, 512)),
    *(f"siglip-large-patch16-{pixels}" for pixels in (256, 384)),
    *(f"siglip-so400m-patch14-{pixels}" for pixels in (224, 384)),
    *(f"siglip2-base-patch16-{pixels}" for pixels in (224, 256, 384, 512)),
    *(f"siglip2-large-patch16-{pixels}" for pixels in (256, 384, 512)),
    *(f"siglip2-so400m-patch14-{pixels}" for pixels in (224, 384)),
    *(f"siglip2-so400m-patch16-{pixels}" for pixels in (256, 384, 512)),
]
CLIP = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}


class Language(NamedTuple):
    name: str
    kind: str  # qwen2, qwen3 or llama: the model class
    width: int
    intermediate: int  # real width of gate and up; config.json of Qwen v1 has twice this value
    layers: int
    heads: int
    groups: int  # num_key_value_heads
    rows: int
    tied: bool


LANGUAGE = [
    Language("Qwen/Qwen-1_8B, Qwen-1_8B-Chat", "qwen2", 2048, 5504, 24, 16, 16, 151936, False),
    Language("Qwen/Qwen-7B, Qwen-7B-Chat", "qwen2", 4096, 11008, 32, 32, 32, 151936, False),
    Language("Qwen/Qwen-14B, Qwen-14B-Chat", "qwen2", 5120, 13696, 40, 40, 40, 152064, False),
    Language("Qwen/Qwen2-0.5B, Qwen2.5-0.5B", "qwen2", 896, 4864, 24, 14, 2, 151936, True),
    Language("Qwen/Qwen2-1.5B, Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    Language("Qwen/Qwen2.5-3B", "qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    Language("Qwen/Qwen2-7B, Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    Language("Qwen/Qwen2.5-14B", "qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    Language("Qwen/Qwen2.5-32B", "qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    Language("Qwen/Qwen2-72B, Qwen2.5-72B", "qwen2", 8192, 29568, 80, 64, 8, 152064, False),
    Language("Qwen/Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, 151936, True),
    Language("Qwen/Qwen3-1.7B", "qwen3", 2048, 6144, 28, 16, 8, 151936, True),
    Language("Qwen/Qwen3-4B", "qwen3", 2560, 9728, 36, 32, 8, 151936, True),
    Language("Qwen/Qwen3-8B", "qwen3", 4096, 12288, 36, 32, 8, 151936, False),
    Language("Qwen/Qwen3-14B", "qwen3", 5120, 17408, 40, 40, 8, 151936, False),
    Language("Qwen/Qwen3-32B", "qwen3", 5120, 25600, 64, 64, 8, 151936, False),
    Language("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 576, 1536, 30, 9, 3, 49152, True),
    Language("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 960, 2560, 32, 15, 5, 49152, True),
]


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def vision_rows() -> list[str]:
    """Rows: checkpoint | pixels | patch | grid | tokens of a photo, first dropped | width | type on disk | bf16."""
    rows = []
    encoders: list[tuple[str, type, Any]] = []
    for name in SIGLIP:
        _, size, patch, pixels = name.split("-")
        config = SiglipConfig(
            **SIZES[size], image_size=int(pixels), patch_size=int(patch.removeprefix("patch")), vision_use_head=False
        )
        encoders.append((f"google/{name}", SigLIPViT, config))
    for name, pixels in CLIP.items():
        encoders.append((name, CLIPViT, CLIPVisionConfig(**LARGE, image_size=pixels, patch_size=14)))
    for name, encoder_class, config in encoders:
        with torch.device("meta"):
            encoder = encoder_class(config)
        grid = config.image_size // config.patch_size
        rows.append(
            f"| `{name}` | {config.image_size} | {config.patch_size} | {grid} × {grid} | {encoder.all_rows - 1} | "
            f"{config.hidden_size} | float32 | {parameters(encoder) * 2 / GIB:.2f} GiB |"
        )
    return rows


def language_rows() -> list[str]:
    """Rows: checkpoint | width | layers | rows of the embedding | tied | parameters | bf16."""
    rows = []
    for model in LANGUAGE:
        settings = {
            "hidden_size": model.width,
            "intermediate_size": model.intermediate,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups,
            "vocab_size": model.rows,
            "tie_word_embeddings": model.tied,
        }
        with torch.device("meta"):
            if model.kind == "qwen2":
                language_model = Qwen2ForCausalLM(Qwen2Config(**settings))
            elif model.kind == "llama":
                language_model = LlamaForCausalLM(LlamaConfig(**settings))
            else:
                language_model = Qwen3ForCausalLM(Qwen3Config(head_dim=128, **settings))
            language_model.tie_weights()
        count = parameters(language_model)
        first, *others = model.name.split(", ")
        names = ", ".join(f"`{name}`" for name in (first, *(f"Qwen/{other}" for other in others)))
        rows.append(
            f"| {names} | {model.width:,} | {model.layers} | {model.rows:,} | {'✓' if model.tied else '✗'} | "
            f"{count / 1e9:.2f} | {count * 2 / GIB:.1f} GiB |"
        )
    return rows


def main() -> None:
    print("\n".join([*vision_rows(), "", *language_rows()]))


if __name__ == "__main__":
    main()
