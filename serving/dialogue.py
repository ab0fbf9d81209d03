"""Messages of a request → messages of the engine. Called by `app.py`."""

from pathlib import Path
from typing import Any, NamedTuple

from serving.photos import PhotoFile, decode_photos, find_photo
from serving.protocol import AssistantTurn, ChatRequest, PhotoPart, RefusalError, SystemTurn, Turn, UserTurn

# A longer text would be cut into tokens for seconds, only to find that no context holds it.
MOST_CHARACTERS = 1_000_000
MOST_PHOTOS = 256


class Dialogue(NamedTuple):
    """Messages in the engine's form, still without photos; `photos` are those of each message."""

    messages: list[dict[str, Any]]
    photos: list[list[PhotoFile]]


def read_dialogue(request: ChatRequest, folder: Path | None) -> Dialogue:
    """Check the messages of a request. The photos of a message go before its text, whatever the order of the parts.

    Args:
        folder: see `find_photo`.

    Raises:
        RefusalError: roles in another order, too much text, too many photos, or an address of `find_photo`.
    """
    dialogue = Dialogue([], [])
    turns = request.messages
    spoken = 1 if isinstance(turns[0], SystemTurn) else 0
    for number, turn in enumerate(turns):
        expected = (UserTurn, AssistantTurn)[(number - spoken) % 2]
        if number >= spoken and not isinstance(turn, expected):
            raise RefusalError(
                400,
                f"'messages.{number}.role' is {turn.role}: after an optional system message, user and assistant must "
                "take turns, the user first",
                f"messages.{number}.role",
            )
        dialogue.messages.append({"role": "system" if number < spoken else turn.role, "content": _text(turn)})
        dialogue.photos.append([
            find_photo(part.image_url.url, f"messages.{number}.content.{place}.image_url.url", folder)
            for place, part in enumerate(turn.content)
            if isinstance(part, PhotoPart)
        ])  # fmt: skip
    if not isinstance(turns[-1], UserTurn):
        raise RefusalError(400, "'messages': the last message must be the user's, it is answered", "messages")
    if sum(len(message["content"]) for message in dialogue.messages) > MOST_CHARACTERS:
        raise RefusalError(400, f"'messages': more than {MOST_CHARACTERS:,} characters, send less text", "messages")
    if sum(map(len, dialogue.photos)) > MOST_PHOTOS:
        raise RefusalError(400, f"'messages': more than {MOST_PHOTOS} photos, send fewer", "messages")
    return dialogue


def _text(turn: Turn) -> str:
    if isinstance(turn.content, str):
        return turn.content
    return "\n".join(part.text for part in turn.content if not isinstance(part, PhotoPart))


def with_photos(dialogue: Dialogue, most_pixels: int) -> list[dict[str, Any]]:
    """Return the messages with their photos decoded; arguments and errors as `decode_photos`."""
    files = [file for files in dialogue.photos for file in files]
    images = iter(decode_photos(files, most_pixels))
    return [
        message | ({"images": [next(images) for _ in files]} if files else {})
        for message, files in zip(dialogue.messages, dialogue.photos, strict=True)
    ]
