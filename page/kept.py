"""Chats outside the page: kept in the browser, opened again, and downloaded.

The server keeps nothing. After each answer the browser gets the chat with small copies of its photos, and stores it
(`browser.js`); opened again, the copies are the photos. A download is a zip file with the photos as they were uploaded,
the chat to read, and the chat as a row for `predict.py --input`.
"""

import base64
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from errors import UserError, check_text, shortened
from page.asking import decoded
from page.chat import History, UploadedPhoto, photos_of, with_part
from page.texts import TEXTS
from page.uploads import store
from visual.photo import photo_size
from visual.region import Box, checked_box, pixel_box
from visual.transform import load_image

COPY_PX = 512  # longest edge of a kept photo: some 40 KB, so 5 MB of storage hold a hundred
TITLE_CHARACTERS = 40


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str
    photos: list[tuple[str, str]] = []  # data URL and name
    box: list[float] | None = None


class _Chat(BaseModel):
    id: str
    title: str
    messages: list[_Message]


def to_keep(history: History, chat_id: str) -> dict[str, Any]:
    """Return a chat as the browser stores it; photos that are gone by now are left out."""
    messages = []
    for number, message in enumerate(history):
        kept = {"role": message["role"], "content": message["content"]}
        if message.get("photos"):
            copies = [(_small_copy(photo.path), photo.name) for photo in message["photos"]]
            kept["photos"] = [[copy, name] for copy, name in copies if copy]
        if "box" in message:
            kept["box"] = _fractions(message["box"], photos_of([*history[:number], message])[-1].path)
        messages.append(kept)
    title = shortened(history[0]["content"].replace("\n", " "), TITLE_CHARACTERS) if history else ""
    return {"id": chat_id, "title": title, "messages": messages}


def _fractions(box: Box, path: str) -> list[float]:
    """Return a box as fractions, because the browser stores a smaller copy of its photo."""
    try:
        width, height = photo_size(path)
        left, top, right, bottom = pixel_box(box, width, height)
    except UserError:  # the photo is gone, and its copy too
        return list(box)
    return [left / width, top / height, right / width, bottom / height]


def opened(stored: Any, folder: Path) -> tuple[History, str]:
    """Return the dialogue of a stored chat, with its photos in `folder`, and its id.

    Raises:
        UserError: it has another form, or a photo cannot be read.
    """
    try:
        chat = _Chat.model_validate(stored)
        contents = _checked_contents(chat.messages)
    except (ValueError, IndexError) as error:  # ValueError: UserError and pydantic's too
        raise UserError(TEXTS["bad_kept"][0]) from error
    history: History = []
    for message, photos in zip(chat.messages, contents, strict=True):
        kept: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "user":
            names = [name for _, name in message.photos]
            paths = [store(folder, content, "photo.jpg") for content in photos]
            kept["photos"] = [UploadedPhoto(path, name) for path, name in zip(paths, names, strict=True)]
            if message.box is not None:
                image = decoded(photos_of([*history, kept])[-1].path)
                kept = with_part(kept, checked_box(message.box), image, folder)
        history.append(kept)
    return history, chat.id


def _checked_contents(messages: list[_Message]) -> list[list[bytes]]:
    """Return the photos of each message, as files.

    Raises:
        ValueError: the first message has no photo, roles do not take turns, or a text, photo or box is wrong.
        IndexError: there are no messages.
    """
    contents = [[_content(url) for url, _ in message.photos] for message in messages]
    if len(messages) % 2 or not contents[0]:
        raise ValueError("not a whole chat")
    image = None
    for number, (message, photos) in enumerate(zip(messages, contents, strict=True)):
        check_text(message.content, "a message")
        if message.role != ("user", "assistant")[number % 2]:
            raise ValueError("roles do not take turns")
        for photo in photos:
            image = load_image(io.BytesIO(photo))  # nothing else gets a file here
        if message.box is not None:
            assert image is not None, "the first message has a photo"
            pixel_box(checked_box(message.box), *image.size)
    return contents


def _small_copy(path: str) -> str:
    """Return a photo as a data URL; empty: it is gone."""
    try:
        image = decoded(path)
    except UserError:
        return ""
    small = min(1.0, COPY_PX / max(image.size))
    image = image.resize([max(1, round(edge * small)) for edge in image.size], Image.Resampling.LANCZOS, reducing_gap=2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _content(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True)


def zipped(history: History, name: str) -> bytes:
    """Return a zip file of a chat: `chat.md` to read, `chat.jsonl` for `predict.py --input`, and the photos.

    Args:
        name: of the checkpoint.
    """
    files: dict[str, str] = {}  # path of an upload → name in the zip file
    for photo in photos_of(history):
        extension = os.path.splitext(photo.path)[1].lower()
        files.setdefault(photo.path, f"photos/{len(files) + 1}{extension}")
    lines, turns = [f"# {name}", ""], []
    for question, answer in zip(history[::2], history[1::2], strict=True):
        names = [files[photo.path] for photo in question["photos"]]
        lines += [f"![]({file})" for file in names]
        lines += [f"▢ {','.join(map(str, question['box']))}"] if "box" in question else []
        lines += ["", *(f"> {line}" for line in question["content"].splitlines()), "", answer["content"], ""]
        turn = {"image": names} if names else {}
        turn |= {"box": question["box"]} if "box" in question else {}
        turns.append(turn | {"question": question["content"], "answer": answer["content"]})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zip_file:  # photos are compressed already
        zip_file.writestr("chat.md", "\n".join(lines))
        zip_file.writestr("chat.jsonl", json.dumps({"turns": turns}, ensure_ascii=False) + "\n")
        for path, file in files.items():
            zip_file.write(path, file)
    return archive.getvalue()
