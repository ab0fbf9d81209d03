"""Agreement between the processes of a run on results and errors. Used by `training/` and `train.py`.

If one process does not enter a collective, the others wait forever. `on_main` therefore runs the work of one process
(reading, writing, deciding) for all. `all_or_none` turns a problem of any process into an error of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from errors import UserError


class AgreedError(UserError):
    """A `UserError` that all processes raise at the same place. They can therefore still save together."""


def on_main(accelerator: Accelerator, task: Callable[[], Any]) -> Any:
    """Run `task` in the first process and return its result in all processes.

    Raises:
        AgreedError: the task raised a UserError; all processes raise the same error.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = task()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise AgreedError(outcome[1])
    return outcome[0]


def all_or_none(accelerator: Accelerator, problem: str | None) -> None:
    """Return if no process has a problem.

    Raises:
        AgreedError: at least one process has a problem; all processes raise the first one.
    """
    problems = [(number, found) for number, found in enumerate(gather_object([problem])) if found is not None]
    if problems:
        number, sentence = problems[0]
        where = f"process {number}: " if accelerator.num_processes > 1 else ""
        raise AgreedError(f"{where}{sentence}")


@contextmanager
def lost_processes() -> Iterator[None]:
    """Convert the communication error after the end of another process into a UserError.

    Raises:
        UserError: another process of the run ended.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no error class of its own; its messages contain the source file
        if isinstance(error, torch.distributed.DistError) or "gloo/" in str(error):
            raise UserError("another process of this run has ended; its own message says why") from error
        raise
