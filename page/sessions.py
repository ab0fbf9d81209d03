"""Changes to how Gradio keeps sessions and uploads, so that a page may run for months. Called by `build.py`.

When an event changes a component, Gradio 6.31 makes another one in its place, with a number of its own. The next event
that reads or writes it keeps it under both numbers, and the second entry stays for good, some with every question.
What it keeps of a session stays after the tab is closed, for up to 10,000 sessions.
"""

import datetime
import os
import secrets
from typing import Any

from gradio.blocks import Block
from gradio.route_utils import GradioUploadFile
from gradio.state_holder import SessionState, StateHolder

KEEP_CLOSED = datetime.timedelta(hours=1)  # as long as Gradio keeps the values of `gr.State` of a closed session


def keep_component_numbers() -> None:
    """Let a component that replaces another in a session have its number."""
    put = SessionState.__setitem__
    if put.__module__ == __name__:
        return

    def put_numbered(state: SessionState, number: int, value: object) -> None:
        if isinstance(value, Block):
            value._id = number
        put(state, number, value)

    SessionState.__setitem__ = put_numbered


def name_uploads_apart() -> None:
    """Let each upload have a path of its own.

    Gradio's paths come from the content. Equal photos of two sessions would be one file, which goes with the session
    that ends first, also when the other one has not asked about it yet.
    """
    make = GradioUploadFile.__init__
    if make.__module__ == __name__:
        return

    def make_apart(upload: GradioUploadFile, *args: Any, **kwargs: Any) -> None:
        make(upload, *args, **kwargs)
        upload.sha.update(secrets.token_bytes(16))

    GradioUploadFile.__init__ = make_apart


def forget_removed(known: list[set[str]]) -> None:
    """Forget files that are gone; Gradio would keep the names of those that sessions removed, and look for them."""
    for files in known:
        files.difference_update([file for file in list(files) if not os.path.lexists(file)])


def forget_closed(holder: StateHolder) -> None:
    """Forget the sessions that were closed and then not used for `KEEP_CLOSED`."""
    before = datetime.datetime.now() - KEEP_CLOSED
    for session, state in list(holder.session_data.items()):
        if state.is_closed and holder.time_last_used.get(session, before) <= before:
            holder.session_data.pop(session, None)
            holder.time_last_used.pop(session, None)
