"""Notes the signals that ask a run to end, so that the loop can read them between steps. Used by `loop.py`."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

# what Ctrl-C, a scheduler's preemption and a closed terminal send; Windows has no SIGHUP
NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALS = [signal.Signals[name] for name in NAMES]
# torchrun sends its processes a signal of its own right after the terminal's, which is no second request
LAUNCHER_SECONDS = 2.0


def outlast_signals(running: torch.Tensor, worker: int) -> None:
    """`worker_init_fn` of data loaders, with `StopSignals.running` bound: while the run lasts, no signal ends a worker.

    Terminals and schedulers send theirs to all processes, and the training process needs its workers to the end of the
    step. At the end of the program, Python sends SIGTERM to those that are left.
    """

    def obey(number: int, frame: FrameType | None) -> None:
        if not running:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, obey)


class StopSignals:
    """`with StopSignals() as stop:` notes the first signal in `stop.received`; a second one has its usual effect.

    A signal that the process was started to ignore stays ignored: `nohup` does this with SIGHUP.

    Attributes:
        received: number of the signal, 0 before one came.
        running: 1 inside of `with`, else 0; in memory that worker processes share.
    """

    def __init__(self) -> None:
        self.received = 0
        self.running = torch.zeros((), dtype=torch.int64).share_memory_()
        self._noted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        self.running.fill_(1)
        return self

    def __exit__(self, *_) -> None:
        self.running.fill_(0)
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
