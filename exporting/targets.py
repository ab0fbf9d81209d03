"""The table of export formats. A new one is a module with an `ExportTarget`, and a line here."""

from exporting import gguf_files, llava, onnx_graphs, openvino_graphs, vipllava
from exporting.stock import ExportTarget

# value of --format → target; the first is the default
TARGETS: dict[str, ExportTarget] = {
    "llava": llava.TARGET,
    "vipllava": vipllava.TARGET,
    "onnx": onnx_graphs.TARGET,
    "openvino": openvino_graphs.TARGET,
    "gguf": gguf_files.TARGET,
}
