"""The target `onnx`: three graphs for ONNX Runtime, which hold every encoder and projector without tiles.

    onnx/vision_encoder.onnx        pixel_values (C, 3, H, W) → image_features (C, M, Dl)
    onnx/embed_tokens.onnx          input_ids (B, T) → inputs_embeds (B, T, Dl)
    onnx/decoder_model_merged.onnx  inputs_embeds, attention_mask (B, P + T), position_ids (B, T), past keys and values
                                    (B, heads, P, width) → logits (B, 1, V) of the last position, present keys and
                                    values

The names are those of optimum's and transformers.js' LLaVA graphs. P cached tokens; the other letters as in DESIGN.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from errors import UserError
from exporting.folder import generation_settings, image_settings, text_config, write_tokenizer
from exporting.stock import ExportTarget, check_tiles, merged_tensors
from model.model import MMultiModal
from visual.transform import PREPROCESSOR_FILE

ANY = torch.export.Dim.DYNAMIC  # a size that differs from call to call
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


class Vision(nn.Module):
    """Encoder and projector."""

    def __init__(self, model: MMultiModal) -> None:
        super().__init__()
        self.encoder, self.feature_proj, self.grid = model.encoder, model.feature_proj, model.encoder.grid

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` → `(C, M, Dl)`."""
        return self.feature_proj(self.encoder(pixel_values), self.grid)


class Decoder(nn.Module):
    """The language model without its embedding, with the cache as plain tensors."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return logits (B, 1, V) of the last position, and keys and values (B, heads, P + T, width) of each layer."""
        cache = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        total, new = attention_mask.shape[1], inputs_embeds.shape[1]
        places = torch.arange(total)
        allowed = (places[None, :] <= places[total - new :, None])[None] & attention_mask[:, None, :].bool()
        mask = torch.zeros(allowed.shape, dtype=inputs_embeds.dtype).masked_fill(
            ~allowed, torch.finfo(inputs_embeds.dtype).min
        )
        states = self.language_model.model(
            inputs_embeds=inputs_embeds, attention_mask=mask[:, None], position_ids=position_ids, past_key_values=cache
        ).last_hidden_state
        return self.language_model.lm_head(states[:, -1:]), [(layer.keys, layer.values) for layer in cache.layers]


def check(model: MMultiModal) -> None:
    """Raise UserError for a model that the graphs cannot hold."""
    check_tiles(model)
    if any(window is not None for window in model.language_model.windows):
        raise UserError("'llm.path' has sliding windows, which graphs are not written with: use --format llava")
    if model.encoder.dtype == torch.bfloat16:
        raise UserError("graphs cannot be run in bfloat16 on a CPU: add --dtype float32 or --dtype float16")


@torch.no_grad()
def write(model: MMultiModal, pixels: torch.Tensor, folder: Path) -> float:
    """Write the folder and return the error of the conversion, 0; the model's LoRA is merged into its weights."""
    (folder / "onnx").mkdir()
    merged_tensors(model.encoder)
    model.encoder.eval()
    language_model = _stock_language_model(model)
    layers = range(language_model.config.num_hidden_layers)
    _graph(
        folder, "vision_encoder", Vision(model), {"pixel_values": pixels[:2].to(model.encoder.dtype)},
        {"pixel_values": {0: ANY}}, ["image_features"],
    )  # fmt: skip
    ids = torch.zeros(2, 3, dtype=torch.int64)
    embedding = language_model.get_input_embeddings()
    _graph(
        folder, "embed_tokens", embedding, {"input": ids}, {"input": {0: ANY, 1: ANY}}, ["inputs_embeds"], ["input_ids"]
    )
    config, cached = language_model.config, 5
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.zeros(2, config.num_key_value_heads, cached, width, dtype=embedding.weight.dtype)
    example = {
        "inputs_embeds": embedding(ids),
        "attention_mask": torch.ones(2, cached + ids.shape[1], dtype=torch.int64),
        "position_ids": torch.arange(cached, cached + ids.shape[1]).expand(2, -1),
        "past": [(keys.clone(), keys.clone()) for _ in layers],
    }
    shapes = {
        "inputs_embeds": {0: ANY, 1: ANY},
        "attention_mask": {0: ANY, 1: ANY},
        "position_ids": {0: ANY, 1: ANY},
        "past": [({0: ANY, 2: ANY}, {0: ANY, 2: ANY}) for _ in layers],
    }
    outputs = ["logits", *(f"present.{index}.{kind}" for index in layers for kind in ("key", "value"))]
    inputs = [*list(example)[:3], *(f"past_key_values.{index}.{kind}" for index in layers for kind in ("key", "value"))]
    _graph(folder, "decoder_model_merged", Decoder(language_model), example, shapes, outputs, inputs)
    _write_settings(model, folder)
    return 0.0


def _stock_language_model(model: MMultiModal) -> PreTrainedModel:
    """The language model, LoRA merged, as transformers' own class with plain attention."""
    settings = text_config(model.language_model)
    stock_class = getattr(transformers, settings["architectures"][0])
    config = stock_class.config_class(**settings)
    state = merged_tensors(model.language_model)
    return stock_class.from_pretrained(
        None, config=config, state_dict=state, attn_implementation="eager", dtype=model.encoder.dtype
    ).eval()


def _graph(
    folder: Path,
    name: str,
    module: nn.Module,
    example: dict[str, Any],
    shapes: dict[str, Any],
    outputs: list[str],
    inputs: list[str] | None = None,
) -> None:
    """Write one graph, its weights beside it in a file of their own."""
    # it logs that torchvision is absent, whose operators no graph of ours has
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (), folder / "onnx" / f"{name}.onnx", kwargs=example, dynamic_shapes=shapes, dynamo=True,
            input_names=inputs, output_names=outputs, external_data=True, verbose=False,
        )  # fmt: skip


def _write_settings(model: MMultiModal, folder: Path) -> None:
    chat = model.processor.chat
    config = {
        "model_type": "llava",
        "image_token_id": chat.image_token_id,
        "image_token_index": chat.image_token_id,
        "image_seq_length": chat.plan.crop_tokens,
        "text_config": text_config(model.language_model),
    }
    files = {"config.json": config, "generation_config.json": generation_settings(model)}
    for name, content in (files | {PREPROCESSOR_FILE: image_settings(model)}).items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tokenizer(model, folder)


TARGET = ExportTarget(check, write, "onnx", bfloat16=False, packages=("onnx", "onnxscript", "onnxruntime"))
