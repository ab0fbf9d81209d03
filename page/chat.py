"""Dialogue of the page: typed text, uploaded photos and their display. Called by `test_gui.py`."""

import html
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page.uploads import photo_name, uploaded_photo

NOTHING = "(no answer 无回答)"


class UploadedPhoto(NamedTuple):
    """A checked upload; `name` is the name of the user's file, for messages."""

    path: str
    name: str


# alternating {"role": "user", "content": text, "photos": [UploadedPhoto, …]} and {"role": "assistant", "content": text}
History = list[dict[str, Any]]


def typed(payload: Any) -> tuple[str, list[Any]]:
    """Return text and uploads from the question box or an API client; neither is checked."""
    payload = payload if isinstance(payload, dict) else {}
    text, uploads = payload.get("text"), payload.get("files")
    return text.strip() if isinstance(text, str) else "", uploads if isinstance(uploads, list) else []


def checked(upload: Any, folder: Path) -> UploadedPhoto:
    """Return an upload without other fields from the client, such as an address that the server would fetch.

    Raises:
        UserError: it is not a file in `folder`.
    """
    return UploadedPhoto(str(uploaded_photo(upload, folder)), photo_name(upload))


def in_box(text: str, photos: Sequence[UploadedPhoto] = ()) -> dict[str, Any]:
    """Content of the question box."""
    files = [{"path": path, "orig_name": name, "mime_type": _kind(path)} for path, name in photos]
    return {"text": text, "files": files}


def answered(history: History) -> History:
    """Return the history without an unanswered last question."""
    return history[: len(history) // 2 * 2]


def photos_of(history: History) -> list[UploadedPhoto]:
    """All photos of a dialogue in reading order."""
    return [photo for message in history for photo in message.get("photos", ())]


def as_shown(history: History) -> History:
    """Return the chat with escaped text, because the page would interpret HTML tags and fetch their images."""
    return [
        {
            "role": message["role"],
            "content": [
                *({"path": photo.path} for photo in message.get("photos", ())),
                html.escape(message["content"], quote=False) or NOTHING,
            ],
        }
        for message in history
    ]


def _kind(path: str) -> str:
    return mimetypes.guess_type(path)[0] or "image"
