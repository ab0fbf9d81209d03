"""The target `openvino`: the graphs of `onnx_graphs.py` for OpenVINO.

openvino/vision_encoder.xml  openvino/embed_tokens.xml  openvino/decoder_model_merged.xml
"""

import importlib
import shutil
from pathlib import Path

import torch

from exporting.onnx_graphs import GRAPHS, check
from exporting.onnx_graphs import write as write_onnx
from exporting.stock import ExportTarget
from model.model import MMultiModal


def write(model: MMultiModal, pixels: torch.Tensor, folder: Path) -> float:
    """Write the folder; see `ExportTarget`."""
    openvino = importlib.import_module("openvino")
    error = write_onnx(model, pixels, folder)
    for name in GRAPHS:
        # not by `convert_model`, which sends statistics of its use
        graph = openvino.Core().read_model(folder / "onnx" / f"{name}.onnx")
        openvino.save_model(graph, folder / "openvino" / f"{name}.xml", compress_to_fp16=False)
    shutil.rmtree(folder / "onnx")
    return error


TARGET = ExportTarget(check, write, "openvino", bfloat16=False, packages=("onnx", "onnxscript", "openvino"))
