"""Lets the processes of a run agree, so that none waits for one that has ended. Used by `build.py` and `state.py`.

If one process does not enter a collective, the others wait for ever. So work of one process alone (reading, writing,
deciding) goes through `on_main`, and a problem of any process through `all_or_none`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from errors import UserError


class AgreedError(UserError):
    """A `UserError` that all processes raise at the same place, so that they can still save together."""


def on_main(accelerator: Accelerator, task: Callable[[], Any]) -> Any:
    """Run `task` in the first process; all get its result.

    Raises:
        AgreedError: the task raised a UserError; all processes raise the same.
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
    """Carry on if no process has a problem.

    Raises:
        AgreedError: at least one has; all processes raise the first.
    """
    problems = [(number, found) for number, found in enumerate(gather_object([problem])) if found is not None]
    if problems:
        number, sentence = problems[0]
        where = f"process {number}: " if accelerator.num_processes > 1 else ""
        raise AgreedError(f"{where}{sentence}")


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn the communication error that a process gets when another has ended into one sentence.

    Raises:
        UserError: another process of the run ended.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own; each names its source file
        if isinstance(error, torch.distributed.DistError) or "gloo/" in str(error):
            raise UserError("another process of this run has ended; its own message says why") from error
        raise
