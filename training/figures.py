"""The figures of a log line from those of single steps; `run_log.py` says what each means. Called by `loop.py`."""

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
    """One line about the steps in `window`.

    Args:
        matrix_peak: operations a second that the device can do at most; None: unknown, and no `mfu`.
        memory_bytes: peak since the start.
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
