"""The target `openvino`: the graphs of `onnx_graphs.py` for OpenVINO.

openvino/vision_encoder.xml  openvino/embed_tokens.xml  openvino/decoder_model_merged.xml

NNCF compresses the weights to 8 bits, or those of the language model's layers to 4.
"""

import functools
import importlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from exporting.onnx_graphs import GRAPHS, check
from exporting.onnx_graphs import write as write_onnx
from exporting.stock import ExportTarget
from exporting.stock_check import import_openvino
from model.model import MMultiModal

GROUP = 64  # weights of a row that share a scale in 4 bits; in 8 bits the whole row does
# Value of --weights → what each graph gets. Encoder and embedding stay in 8 bits: they are small, and the encoder's 4
# bits alone changed the logits of the demo's checkpoint nearly as much as those of the whole language model.
COMPRESSIONS = {
    "int8": dict.fromkeys(GRAPHS, "int8_asym"),
    "int4": dict.fromkeys(GRAPHS, "int8_asym") | {"decoder_model_merged": "int4_asym"},
}


def write(model: MMultiModal, pixels: torch.Tensor, folder: Path, compression: str = "") -> float:
    """Write the folder; see `ExportTarget`. `compression` is a key of `COMPRESSIONS`, or empty."""
    openvino = import_openvino()
    error = write_onnx(model, pixels, folder)
    for name in GRAPHS:
        graph = openvino.Core().read_model(folder / "onnx" / f"{name}.onnx")
        if compression:
            graph = _compressed(graph, COMPRESSIONS[compression][name])
        try:
            openvino.save_model(graph, folder / "openvino" / f"{name}.xml", compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream error" not in str(error):
                raise
            raise OSError(
                None, f"OpenVINO could not write {name} ({error}), probably because the disk is full"
            ) from error
    shutil.rmtree(folder / "onnx")
    return error


def _compressed(graph: Any, mode: str) -> Any:
    """The graph with matrices of integers, with scales and zero points.

    In 4 bits, NNCF keeps `lm_head` in 8. Rows that `GROUP` does not divide are cut by the largest power of two that
    does, from 32 on, or get 8 bits.
    """
    nncf = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)  # its tables of every layer
    settings = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(mode),
        group_size=GROUP if mode == "int4_asym" else None,
        advanced_parameters=settings,
    )


TARGET = ExportTarget(
    check,
    write,
    "openvino",
    bfloat16=False,
    packages=("onnx", "onnxscript", "openvino"),
    quantised={name: functools.partial(write, compression=name) for name in COMPRESSIONS},
    quantised_packages=dict.fromkeys(COMPRESSIONS, ("nncf",)),
)
