"""The dialogue of the page: what was typed, the photos it was sent with, and how both are shown. For `test_gui.py`."""

import html
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page.uploads import photo_name, uploaded_photo

NOTHING = "(no answer 无回答)"


class Photo(NamedTuple):
    """An upload that was checked; `name` is that of the user's file, for messages."""

    path: str
    name: str


# in turn {"role": "user", "content": text, "photos": [Photo, …]} and {"role": "assistant", "content": text}
History = list[dict[str, Any]]


def typed(payload: Any) -> tuple[str, list[Any]]:
    """Text and uploads of what the question box, or an API client, sends; neither is checked."""
    payload = payload if isinstance(payload, dict) else {}
    text, uploads = payload.get("text"), payload.get("files")
    return text.strip() if isinstance(text, str) else "", uploads if isinstance(uploads, list) else []


def checked(upload: Any, folder: Path) -> Photo:
    """An upload without what else a client sent of it, such as an address that the server would fetch.

    Raises:
        UserError: it is no file in `folder`.
    """
    return Photo(str(uploaded_photo(upload, folder)), photo_name(upload))


def in_box(text: str, photos: Sequence[Photo] = ()) -> dict[str, Any]:
    """What the question box holds."""
    files = [{"path": path, "orig_name": name, "mime_type": _kind(path)} for path, name in photos]
    return {"text": text, "files": files}


def answered(history: History) -> History:
    """The history without a last question that has no answer."""
    return history[: len(history) // 2 * 2]


def photos_of(history: History) -> list[Photo]:
    """All photos of a dialogue in reading order."""
    return [photo for message in history for photo in message.get("photos", ())]


def as_shown(history: History) -> History:
    """The chat in letters: the page would take tags in a text for HTML and drop them, or fetch pictures they name."""
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
