"""Check of the photos of a source (`data.check_images`). `process_image.py` calls it once per source.

Worker processes decode the photos, because a decoder may crash its process and holds the interpreter lock. They are
started by "spawn" on every system, so tests on Linux cover the behaviour on Windows.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import ThreadPool
from multiprocessing.synchronize import Event
from typing import Any

from tqdm import tqdm

from dataset.entries import photo_path
from errors import UserError, shortened
from paths import address
from visual.photo import load_image
from visual.shard import member_of
from visual.web import WebError

CHUNK = 16  # photos per task of a process
MOST_PROCESSES = 8  # a process may need 0.8 GB for a large photo; 8 processes decode about as fast as a disk reads

Problem = tuple[str, str]  # reason, detail
Check = Callable[[list[str]], dict[str, Problem]]  # photo paths -> {unusable path: problem}

_stop: Event | None = None  # in a worker process: set when the results are no longer needed


def photo_check(mode: str, source: str, processes: int | None = None) -> Check | None:
    """Return the check for one value of `data.check_images`: none, exists or open (decode).

    Args:
        mode: the value.
        source: name of the source, for the progress bar.
        processes: number of decoding processes; None: number of cores, at most `MOST_PROCESSES`.
    """
    if mode == "none":
        return None

    def check(paths: list[str]) -> dict[str, Problem]:
        found = {}
        chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        results = _decode_all(chunks, processes or _cores()) if mode == "open" else _stat_all(chunks)
        # closing the generator ends the processes at once if Ctrl-C stops the loop
        with tqdm(desc=f"{source}: photos", total=len(paths), unit="photo") as bar, contextlib.closing(results):
            for chunk, problems in zip(chunks, results, strict=True):
                found |= {path: problem for path, problem in zip(chunk, problems, strict=True) if problem is not None}
                bar.update(len(chunk))
        return found

    return check


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def _missing(path: str) -> Problem | None:
    file = photo_path(path)
    if member := member_of(file):
        # the loader has just read its header; on the web it has also seen how large the shard is
        if not address(member.shard):
            if not os.path.isfile(member.shard):  # a row of another format may name it
                return "photo not found", shortened(path)
            if member.start + member.size > os.path.getsize(member.shard):
                return "photo is cut off in its shard", shortened(path)
        return None if member.size else ("photo file is empty", shortened(path))
    if not os.path.isfile(file):  # Path.is_file raises an error for names that are too long
        return "photo not found", shortened(path)
    if file.stat().st_size == 0:
        return "photo file is empty", shortened(path)
    return None


def _undecodable(path: str) -> Problem | None:
    problem = _missing(path)
    if problem is None:
        try:
            load_image(photo_path(path))
        except WebError:
            raise
        except UserError as error:
            return "photo cannot be decoded", shortened(error)
    return problem


def _stat_all(chunks: list[list[str]]) -> Generator[list[Problem | None], None, None]:
    with ThreadPool() as pool:  # threads hide the latency of network file systems
        yield from pool.imap(lambda chunk: [_missing(path) for path in chunk], chunks)


def _decode_all(chunks: list[list[str]], processes: int) -> Generator[list[Problem | None], None, None]:
    if len(chunks) <= 1 or processes == 1:  # starting a process takes longer than decoding 16 photos
        yield from ([_undecodable(path) for path in chunk] for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(min(processes, len(chunks)), context, _start_worker, (stop,))
    pending: deque[tuple[list[str], Future[Any]]] = deque()
    try:
        for chunk in chunks:
            with _interrupts_held():
                pending.append((chunk, pool.submit(_decode_chunk, chunk)))
            if len(pending) > 2 * processes:  # limits memory, independent of the number of photos
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _result(chunk: list[str], future: Future[Any]) -> list[Problem | None]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes photos was ended, by lack of memory or a crash of the decoder, at one of these "
            f"photos or soon after: {shortened(', '.join(chunk))}; close other programs, or move the photo away"
        ) from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back while processes start, because the terminal sends Ctrl-C to all; only the parent handles it.

    The processes inherit the mask. In the parent, it does not suffice: another thread, such as that of a progress bar,
    takes the signal, and the main thread would raise KeyboardInterrupt before a process has got its first message.
    """
    with contextlib.ExitStack() as ends:  # the last one first
        if threading.current_thread() is threading.main_thread():  # others get no signal, and may set no handler
            told: list[int] = []
            handler = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
            ends.callback(lambda: signal.raise_signal(signal.SIGINT) if told else None)
            ends.callback(signal.signal, signal.SIGINT, handler)
        if hasattr(signal, "pthread_sigmask"):  # Windows: workers ignore it from `_start_worker` on
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            ends.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        yield


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker ends with its parent"
    parent.join()  # a killed parent does not end its workers
    os._exit(1)


def _decode_chunk(paths: list[str]) -> list[Problem | None]:
    return [None if _stop is not None and _stop.is_set() else _undecodable(path) for path in paths]
