"""Device and precision of a model. Used by `model/model.py` and `training/`."""

import math
from typing import Literal

import torch

from compat import has_fp16_product, onednn_has_bf16
from errors import UserError

Precision = Literal["auto", "bf16", "fp16", "float32"]
# Weights of the LLM's linear layers from which on fp16 is taken by itself. At Qwen2.5-0.5B's shape (494 million) it
# answers 1.6 to 3.1 times as fast, at the demo's not (`benchmarks.answer_weights`); nothing was measured between them.
LARGE = 3 * 10**8
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return `device` if given, else the first available one of CUDA, Apple's MPS and the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether oneDNN computes matrix products in bf16 with native instructions of this CPU.

    Torch's private operator reports only what oneDNN may use (`ONEDNN_MAX_CPU_ISA` can hide instructions). It returns
    true for any AVX512. Without bf16 instructions, products are emulated and slower than in float32, so the CPU's
    capabilities are checked too.
    """
    if not onednn_has_bf16():
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def pick_precision(precision: Precision, device: torch.device) -> str:
    """Return the precision; `auto` is bf16 if the device computes in it, fp16 on older GPUs, else float32.

    Raises:
        UserError: bf16 on a GPU without it, or fp16 without a CUDA GPU.
    """
    if device.type == "cuda":
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif device.type == "cpu":
        best = "bf16" if cpu_has_bf16() else "float32"
    else:
        best = "float32"
    if precision == "bf16" and device.type == "cuda" and best != "bf16":
        raise UserError("'train.precision': this GPU has no bf16; use auto, fp16 or float32")
    if precision == "fp16" and device.type != "cuda":
        raise UserError("'train.precision': fp16 needs a CUDA GPU; use auto, bf16 or float32")
    return best if precision == "auto" else precision


def answering_weights(
    precision: Precision | None, device: torch.device, quantization: str = "none"
) -> tuple[torch.dtype, float]:
    """Return the dtype of the weights for answering, and from how many of the LLM on `qwen.half` makes these fp16.

    Args:
        precision: as in `pick_precision`, with its errors. None: `auto`, but float32 on a CPU, where LoRA can be merged
            into float32 weights only; those of a large LLM become fp16 then, if torch can multiply by them.
        quantization: `llm.quantization`; with any, None makes nothing fp16.

    Raises:
        UserError: fp16 on a CPU without products for it.
    """
    if device.type == "cpu" and precision == "fp16":
        if not has_fp16_product():
            raise UserError("'train.precision': on a CPU, fp16 needs an x86 build of torch; use auto, bf16 or float32")
        return torch.float32, 0
    if precision is None and device.type == "cpu":
        return torch.float32, LARGE if has_fp16_product() and quantization == "none" else math.inf
    return DTYPES[pick_precision(precision or "auto", device)], math.inf
