"""The lock of a run folder, because two runs in one folder would overwrite each other's checkpoints and log.

Called by `state.py` and `stages.py`; `loop.py` holds the lock while it trains. The system releases it when its process
ends, however that happens.
"""

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from errors import UserError, file_error
from model.checkpoint_folder import recover

LOCK_FILE = "in-use.lock"
# in seconds: the loader's workers of a killed run hold its lock until they notice, which they check every 5 seconds
WAIT = 10.0


def folder_lock(output_dir: Path) -> BaseFileLock:
    """Return the lock of a run folder, not held yet."""
    return FileLock(output_dir / LOCK_FILE, timeout=WAIT)


def hold(lock: BaseFileLock) -> None:
    """Acquire the lock of an existing folder.

    Raises:
        UserError: another run holds it, or its file cannot be written.
    """
    folder = Path(lock.lock_file).parent
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"'train.output_dir': a run is training in {folder}: wait for its end, or set another train.output_dir"
        ) from error
    except OSError as error:
        raise file_error(error, folder, "set another train.output_dir") from error


def recover_free(output_dir: Path) -> None:
    """Mend what a killed run left in its folder (`recover`), unless a run is training in it.

    That run would lose the checkpoint that it is just writing.

    Raises:
        UserError: a run is training in the folder.
    """
    if (output_dir / LOCK_FILE).exists():
        lock = folder_lock(output_dir)
        hold(lock)
        lock.release()
    recover(output_dir)
