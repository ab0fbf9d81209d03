"""Handlers of stop signals; the loop reads the received signal between steps, and loader processes outlast it."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

# signals of Ctrl-C, of a scheduler's preemption and of a closed terminal; Windows has no SIGHUP
NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALS = [signal.Signals[name] for name in NAMES]
# torchrun sends its processes another signal right after the terminal's signal; it is not a second request
LAUNCHER_SECONDS = 2.0


def outlast_signals(running: torch.Tensor, worker: int) -> None:
    """Ignore signals in a data-loader worker during the run; a `worker_init_fn` with `StopSignals.running` bound.

    Terminals and schedulers send signals to all processes, but the training process needs its workers to the end of the
    step. At the end of the program, Python sends SIGTERM to the remaining workers.
    """

    def obey(number: int, frame: FrameType | None) -> None:
        if not running:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, obey)


class StopSignals:
    """Context manager that stores the first stop signal in `received`; a second signal has its usual effect.

    A signal that is ignored at process start stays ignored; `nohup` does this with SIGHUP.

    Attributes:
        received: number of the signal; 0 if none.
        running: 1 inside `with`, else 0; in memory shared with worker processes.
    """

    def __init__(self) -> None:
        self.received = 0
        self.running = torch.zeros((), dtype=torch.int64).share_memory_()
        self._noted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only in the main thread
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
