"""Notes the signals that ask a run to end, so that the loop can read them between steps. Used by `loop.py`."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# what Ctrl-C, a scheduler's preemption and a closed terminal send; Windows has no SIGHUP
NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALS = [signal.Signals[name] for name in NAMES]
# torchrun sends its processes a signal of its own right after the terminal's, which is no second request
LAUNCHER_SECONDS = 2.0


def ignore_terminal(worker: int) -> None:
    """`worker_init_fn` of data loaders: ignore Ctrl-C and a closed terminal.

    Both reach the whole process group, but the training process needs its workers to finish the step. torch ends the
    workers by SIGTERM, so that signal keeps torch's handler.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """`with StopSignals() as stop:` notes the first signal in `stop.received`; a second one has its usual effect.

    Attributes:
        received: number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._noted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if self.received and not (launched and time.monotonic() - self._noted_at < LAUNCHER_SECONDS):
            self._restore()
            signal.raise_signal(number)
            return
        self.received = self.received or number
        self._noted_at = time.monotonic()
