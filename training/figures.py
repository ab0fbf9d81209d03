"""Figures of a log line from the figures of its steps; `run_log.py` defines them. Called by `due.py`."""

from typing import Any

SUMMED = (
    "loss",
    "grad_norm",
    "supervised_tokens",
    "tokens",
    "questions",
    "seconds",
    "waited",
    "operations",
)


def summarise(window: list[dict[str, Any]], matrix_peak: float | None, memory_bytes: int) -> dict[str, Any]:
    """Summarise the steps in `window` as one log line.

    Args:
        matrix_peak: most operations per second of the device; None: unknown, so the line has no `mfu`.
        memory_bytes: peak memory since the start.
    """
    total = {name: sum(figures[name] for figures in window) for name in SUMMED}
    steps, seconds, last = len(window), total["seconds"], window[-1]
    line = {
        "loss": total["loss"] / steps,
        "grad_norm": total["grad_norm"] / steps,
        **last["rates"],
        "epoch": last["epoch"],
        "supervised_tokens": total["supervised_tokens"] / steps,
        "seconds": seconds / steps,
        "questions_per_second": total["questions"] / seconds,
        "tokens_per_second": total["tokens"] / seconds,
        "supervised_tokens_per_second": total["supervised_tokens"] / seconds,
        "data_wait": total["waited"] / seconds,
        "peak_memory_gib": memory_bytes / 2**30,
        "replaced_photos": last["replaced_photos"],
    }
    if matrix_peak is not None:
        line["mfu"] = total["operations"] / seconds / matrix_peak
    return line
