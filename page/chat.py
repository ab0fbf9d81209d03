"""Dialogue of the page: typed text, uploaded photos, and how they are shown."""

import html
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from page.texts import say
from page.uploads import photo_name, store, uploaded_photo
from visual.region import Box, pixel_box


class UploadedPhoto(NamedTuple):
    """A checked upload; `name` is the name of the user's file, for messages."""

    path: str
    name: str


# Alternating {"role": "user", "content": text, "photos": [UploadedPhoto, …]} and {"role": "assistant", "content": text}
# A question about a part of a photo has a "box" too, and its "part", a file with the pixels inside it.
History = list[dict[str, Any]]


def typed(payload: Any) -> tuple[str, list[Any]]:
    """Return text and uploads from the question box or an API client; neither is checked."""
    payload = payload if isinstance(payload, dict) else {}
    text, uploads = payload.get("text"), payload.get("files")
    return text.strip() if isinstance(text, str) else "", uploads if isinstance(uploads, list) else []


def typed_files(payload: Any) -> list[str]:
    """Return the paths of the uploads in the question box, unchecked."""
    paths = [upload.get("path") for upload in typed(payload)[1] if isinstance(upload, dict)]
    return [path for path in paths if isinstance(path, str)]


def checked(upload: Any, folder: Path) -> UploadedPhoto:
    """Return an upload without other fields from the client, such as an address that the server would fetch.

    Raises:
        NotUploadedError: it is not a file in `folder`.
    """
    return UploadedPhoto(str(uploaded_photo(upload, folder)), photo_name(upload))


def as_upload(photo: UploadedPhoto) -> dict[str, Any]:
    """Return a photo as the question box has it."""
    return {"path": photo.path, "orig_name": photo.name, "mime_type": mimetypes.guess_type(photo.path)[0] or "image"}


def in_box(text: str, photos: Sequence[UploadedPhoto] = ()) -> dict[str, Any]:
    """Content of the question box."""
    return {"text": text, "files": [as_upload(photo) for photo in photos]}


def answered(history: History) -> History:
    """Return the history without an unanswered last question."""
    return history[: len(history) // 2 * 2]


def photos_of(history: History) -> list[UploadedPhoto]:
    """All photos of a dialogue in reading order."""
    return [photo for message in history for photo in message.get("photos", ())]


def files_of(history: History) -> list[str]:
    """All files that a dialogue needs."""
    parts = [message["part"] for message in history if "part" in message]
    return [photo.path for photo in photos_of(history)] + parts


def with_names(text: str, photos: list[UploadedPhoto]) -> str:
    """Return a message with names of files in place of their paths on the server."""
    for photo in photos:
        text = text.replace(photo.path, photo.name)
    return text


def with_part(question: dict[str, Any], box: Box, image: Image.Image, folder: Path) -> dict[str, Any]:
    """Return a question about the part of `image` inside `box`; errors as `pixel_box`."""
    file = io.BytesIO()
    image.crop(pixel_box(box, *image.size)).save(file, "PNG")
    return question | {"box": box, "part": store(folder, file.getvalue(), "part.png")}


def as_shown(history: History, language: str) -> list[dict[str, Any]]:
    """Return the chat with escaped text, because the page would interpret HTML tags and fetch their images."""
    shown = []
    for message in history:
        content: list[Any] = [{"path": photo.path, "alt_text": photo.name} for photo in message.get("photos", ())]
        if "part" in message:
            content.append({"path": message["part"], "alt_text": say(language, "part_of_photo")})
        content.append(html.escape(message["content"], quote=False) or say(language, "no_answer"))
        shown.append({"role": message["role"], "content": content})
    return shown
