"""Costs of training: arithmetic, matrix peak of a GPU, memory. Called by `build.py` and `due.py`."""

import ctypes
import functools
import gc
import sys
import threading

import psutil
import torch
from torch import nn

from model.model import MMultiModal

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# products of square matrices that measure the peak of a GPU: side lengths, products per round, rounds
PEAK_SIZES = (2048, 4096, 8192)
PEAK_PRODUCTS = 10
PEAK_ROUNDS = 5
SAMPLING_SECONDS = 0.002  # between two readings of this process's memory


class Arithmetic:
    """Floating-point operations that a training step needs, without recomputing and padding.

    A matrix with P weights costs 2·P per position in the forward pass and 2·P for the gradient of its input. A trained
    matrix costs 2·P more for its own gradient (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). The counts are:

    * frozen weights of the language model: 4·P·T; LoRA and projector: 6·P·T.
    * `lm_head` and the MLP of the last layer: the same, for supervised positions only.
    * frozen encoder: 2·P per row, because it needs no backward pass; with LoRA: 4·P.

    Attention scores are not counted: in the language model they add about 1 % at T = 800 and the widths of a 7B model.
    Convolutions are not counted either. Gradients are counted down to the first matrix of encoder and language model,
    even if nothing below is trained (LoRA on the encoder; LoRA behind a frozen projector). With 27 layers, this is
    0.5 % too many. Otherwise the count equals the matrix products that run (`tests/training/test_costs.py`).
    """

    def __init__(self, model: MMultiModal) -> None:
        language_model = model.language_model
        head = language_model.get_output_embeddings()
        last_mlp = _linear_operations(language_model.model.layers[-1].mlp, frozen=4, trained=6)
        self.per_supervised = last_mlp + (6 if head.weight.requires_grad else 4) * head.in_features * head.out_features
        self.per_token = _linear_operations(language_model, frozen=4, trained=6) - self.per_supervised
        trained = next(model.feature_proj.parameters()).requires_grad
        self.per_crop = model.feature_proj.operations(model.encoder.grid, trained, model.trains_encoder)
        rows = model.encoder.all_rows
        frozen = 4 if model.trains_encoder else 2
        self.per_encoded_crop = rows * _linear_operations(model.encoder, frozen=frozen, trained=6)

    def operations(self, tokens: int, supervised: int, crops: int, encoded: int) -> int:
        """Return the operations of a step.

        Args:
            tokens: all tokens.
            supervised: supervised tokens.
            crops: all crops.
            encoded: crops that the encoder computes, that is, crops without cached features.
        """
        return (
            tokens * self.per_token
            + supervised * self.per_supervised
            + crops * self.per_crop
            + encoded * self.per_encoded_crop
        )


def _linear_operations(module: nn.Module, frozen: int, trained: int) -> int:
    # use the shape of the layer, because a 4-bit weight stores two numbers per element
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(
        (trained if layer.weight.requires_grad else frozen) * layer.in_features * layer.out_features for layer in layers
    )


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measure the operations per second of the fastest large square matrix product on a GPU.

    Call it before training starts. On a CPU it returns None, because a square product is not the peak there: wide
    layers in bf16 reached 1.3 times as much, and a share above 1 is meaningless.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    peak = max(_products_per_second(size, device, dtype) for size in peak_sizes(free, dtype))
    torch.cuda.empty_cache()  # free the memory of the matrices before training
    return peak


def peak_sizes(free: int, dtype: torch.dtype) -> list[int]:
    """Return the side lengths to try: the three matrices of a product take at most a tenth of `free` bytes."""
    fitting = [size for size in PEAK_SIZES if 3 * size**2 * dtype.itemsize <= free / 10]
    return fitting or [PEAK_SIZES[0]]


def _products_per_second(size: int, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)  # keeps the global generator unchanged
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    torch.mm(left, right, out=product)  # warm-up: loads the kernel and raises the clock rate
    fastest = float("inf")
    for _ in range(PEAK_ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(PEAK_PRODUCTS):  # enough products to hide the launch time
            torch.mm(left, right, out=product)
        ended.record()
        ended.synchronize()
        fastest = min(fastest, began.elapsed_time(ended) / 1000)  # milliseconds
    return PEAK_PRODUCTS * 2 * size**3 / fastest


class PeakMemory:
    """Peak memory of a block: `with PeakMemory(device) as peak: …`, then `peak.bytes`.

    On a CUDA device it is the peak of allocated memory. Elsewhere it is the peak resident memory of this process, read
    every 2 ms and therefore rough.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()
            if hasattr(LIBC, "malloc_trim"):  # glibc keeps freed memory, which would count as used
                LIBC.malloc_trim(0)
            self._done = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(SAMPLING_SECONDS):
            self.bytes = max(self.bytes, process.memory_info().rss)
        self.bytes = max(self.bytes, process.memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes since the start: allocated on a CUDA device, elsewhere resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
