"""Load a Qwen checkpoint of any generation strictly, unquantised or quantised. Called by `model/model.py`."""

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

from errors import UserError, require_complete
from qwen import attention, qwen1
from qwen.Mqwen import MLlamaForCausalLM, MQwen2ForCausalLM, MQwen3ForCausalLM

# `model_type` in config.json
LANGUAGE_MODELS = {
    "qwen": qwen1.MQwen1ForCausalLM,
    "qwen2": MQwen2ForCausalLM,
    "qwen3": MQwen3ForCausalLM,
    "llama": MLlamaForCausalLM,
}


# tensors of a LLaVA model: those of its language model, in the names of all versions of transformers, and the others
STOCK = "llava"
STOCK_NAMES = {r"^language_model\.lm_head\.": "lm_head.", r"^(?:model\.)?language_model\.(?:model\.)?": "model."}
STOCK_OTHERS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def loading_options(
    dtype: torch.dtype, placement: torch.device | Literal["auto"], quantization: Literal["none", "nf4", "int8"]
) -> dict[str, Any]:
    """Return keyword arguments of transformers' `from_pretrained`, which load final weights directly on their device.

    Args:
        dtype: of the weights; with quantisation, of the products and the unquantised weights (embedding, `lm_head`).
        placement: a device, or `auto`: all GPUs and, if they are too small, the CPU.
        quantization: nf4 as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314), with its double quantisation.

    Raises:
        UserError: quantisation without bitsandbytes.
    """
    options = {
        "dtype": dtype,
        "device_map": "auto" if placement == "auto" else {"": placement},
    }
    if quantization == "none":
        return options
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"'llm.quantization' is {quantization}, which needs bitsandbytes: pip install bitsandbytes==0.50.2, or set "
            "llm.quantization=none"
        )
    if quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        # it logs in every layer of every step that activations become fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return options | {"quantization_config": settings}


def load_language_model(
    folder: Path,
    dtype: torch.dtype,
    image_token_id: int,
    vocabulary_size: int,
    placement: torch.device | Literal["auto"] = torch.device("cpu"),  # noqa: B008 - a constant
    quantization: Literal["none", "nf4", "int8"] = "none",
):
    """Load a Qwen checkpoint strictly; `dtype`, `placement` and `quantization` as in `loading_options`.

    Args:
        vocabulary_size: number of ids of the tokenizer, `<|extra_0|>` included; the embedding is resized only if it
            has fewer rows.

    Raises:
        UserError: an unsupported architecture, tensors that are missing, left over or of the wrong shape, or
            quantisation without bitsandbytes.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stock = raw.get("model_type") == STOCK  # a whole model as `export.py` writes it
    model_type = raw["text_config"].get("model_type", "llama") if stock else raw.get("model_type")
    if model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise UserError(f"'llm.path': {folder} is of type '{model_type}'; supported: {known}")
    model_class = LANGUAGE_MODELS[model_type]
    if model_type == "qwen":
        config, ours = qwen1.read_config(folder), qwen1
        qwen1.register_names(model_class.__name__)
    else:
        config, ours = AutoConfig.from_pretrained(folder), attention
    if stock:
        tied = raw.get("tie_word_embeddings", raw["text_config"].get("tie_word_embeddings", False))
        config = config.text_config
        config.tie_word_embeddings = tied
    ours.register_attention()
    language_model, info = model_class.from_pretrained(
        folder,
        config=config,
        attn_implementation=ours.ATTENTION,
        ignore_mismatched_sizes=True,  # require_complete names these tensors; transformers would not
        output_loading_info=True,
        key_mapping=STOCK_NAMES if stock else None,
        **loading_options(dtype, placement, quantization),
    )
    others = {name for name in info["unexpected_keys"] if stock and STOCK_OTHERS.search(name)}
    require_complete({**info, "unexpected_keys": info["unexpected_keys"] - others}, "llm.path", folder)
    if quantization == "nf4":
        _keep_4bit_layout(language_model)
    if quantization == "int8":
        _keep_no_inputs(language_model)
    language_model.image_token_id = image_token_id
    # published generation configs set a repetition penalty and sampling; here only config section `generate` applies
    language_model.generation_config = GenerationConfig()
    if vocabulary_size > language_model.get_input_embeddings().weight.shape[0]:
        # the new rows are never read, so their values do not matter
        language_model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    return language_model


def _keep_4bit_layout(language_model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights at the first eval pass, as it does on a CPU with bf16.

    Repacked weights round scales and products to bf16 at any precision, have no backward pass, and need layer sizes
    that are multiples of 32. Training after a validation would fail, and answers would depend on the CPU.
    """
    from bitsandbytes.nn import Linear4bit  # installed only if it is needed

    for module in language_model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


class _FrozenInt8Linear(torch.autograd.Function):
    """A frozen 8-bit layer of bitsandbytes, whose backward pass needs its weights only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module, forward: Callable) -> torch.Tensor:
        ctx.layer = layer
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        state = ctx.layer.state
        # 127 is the largest value of a row; SCB its size before rounding
        weight = state.CB.to(gradient.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1 / 127))
        return gradient @ weight, None, None


def _keep_no_inputs(language_model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from keeping the inputs of 8-bit layers for the backward pass.

    It keeps them where gradient checkpointing does not see them, so a step of a 7B model took as much memory as with
    16-bit weights. Frozen weights need no inputs.
    """
    from bitsandbytes.nn import Linear8bitLt  # installed only if it is needed

    def run(layer: torch.nn.Module, forward: Callable, x: torch.Tensor) -> torch.Tensor:
        return _FrozenInt8Linear.apply(x, layer, forward) if torch.is_grad_enabled() else forward(x)

    for module in language_model.modules():
        if isinstance(module, Linear8bitLt):
            module.forward = partial(run, module, module.forward)
