"""Turns of a raw row and the photos of each turn; called by `dataset/raw.py` and `predict.py`.

A row has its photos under `image` or `images`, one file or a list of files, else under `image_id`. They belong to the
tags `<image>` of its questions, in order, in any turn. Without a tag, they come before the first question:

    {"image": ["1.jpg", "2.jpg"], "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And this? <image>"}, {"from": "gpt", "value": "A dog."}]}

Instead of `conversations`, a row may have one `question` and `answer`, or a list `turns`. Each of the `turns` may have
its own photos. They then belong to the tags of that turn, or come before its question if it has no tag. The photos of
the row are then those of the first turn:

    {"image": "1.jpg", "turns": [{"question": "What is it?", "answer": "A cat."},
                                 {"question": "And this?", "answer": "A dog.", "image": "2.jpg"}]}

A row or one of its `turns` may have a `box` (`visual/region.py`): its question is then about this part of the last
photo before it, and the model sees the part as one more photo, after the photos of the turn. A row's box is that of its
first question:

    {"image": "1.jpg", "box": [40, 60, 180, 200], "question": "What is it?", "answer": "A cat."}

`<image>` becomes `<|extra_0|>`; in answers it stays text. An unusable row raises `DropRowError`.
"""

import itertools
import posixpath
from typing import Any

from config import IMAGE_TAG
from dataset.rows import DropRowError, check_text, is_blank, shown
from errors import UserError
from visual.region import checked_box

IMAGE_WORD = "<image>"  # the photo's place in LLaVA annotations
PHOTOS_AND_TAGS = f"number of {IMAGE_WORD} tags is not that of photos"

Notes = dict[str, int]  # name of a count of `Report` -> number that the row adds if it is kept
Turns = list[dict[str, Any]]  # "q", "a" and, if the turn has them, "images" (names of its photos) and "box"


def image_names(row: dict[str, Any]) -> list[str]:
    """Return the photo names of a row or turn, from `image` or `images`, else from `image_id`."""
    values = [row[field] for field in ("image", "images") if row.get(field) not in (None, [])]
    if not values:
        values = [[] if row.get("image_id") is None else row["image_id"]]
    named = [[_safe_name(name) for name in (value if isinstance(value, list) else [value])] for value in values]
    if named[1:] and named[0] != named[1]:
        raise DropRowError("image and images name different photos", shown(values))
    return named[0]


def _safe_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DropRowError("photo name is not a file name", shown(name))
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith(("/", "../")) or clean in (".", "..") or clean[1:2] == ":":
        raise DropRowError("photo path leaves the image folder", name)
    return clean


def dialogue(messages: Any, notes: Notes) -> Turns:
    """Return the turns of LLaVA's `conversations`; `human` and `gpt` must alternate."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise DropRowError("conversations is not a list of messages", shown(messages))
    speakers = [message.get("from") for message in messages]
    if speakers != ["human", "gpt"] * (len(messages) // 2):
        raise DropRowError("human and gpt do not take turns", ", ".join(map(shown, speakers)))
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return [{"q": _question(human.get("value")), "a": answers_of(gpt.get("value"), notes)} for human, gpt in pairs]


def turn_of(row: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Return the turn from `question` or `q` and `answer` or `a`."""
    question = _question(row.get("question", row.get("q")))
    return {"q": question, "a": answers_of(row.get("answer", row.get("a")), notes)}


def kind_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the question type of a row or turn as `{"type": text}`, or `{}`."""
    kind = item.get("type")
    return {} if kind is None else {"type": kind if isinstance(kind, str) else shown(kind)}


def box_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the box of a row or turn as `{"box": box}`, or `{}`."""
    if item.get("box") is None:
        return {}
    try:
        return {"box": checked_box(item["box"])}
    except UserError as error:
        raise DropRowError("wrong box", error) from error


def _question(value: Any) -> str:
    check_text(value, "question")
    return value


def answers_of(value: Any, notes: Notes) -> list[str]:
    """Return the non-blank answers of a text or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    if any(not isinstance(text, str) for text in texts):
        raise DropRowError("no answer" if value is None else "answer is not text", shown(value))
    answers = [text for text in texts if not is_blank(text)]
    if not answers:
        raise DropRowError("no answer", shown(value))
    for text in answers:
        check_text(text, "answer")
    if len(answers) < len(texts):
        notes["blank_answers"] = notes.get("blank_answers", 0) + len(texts) - len(answers)
    return answers


def place_photos(turns: Turns, names: list[str], notes: Notes, seen: bool = False) -> Turns:
    """Assign the photos of a row to the turns with tags, in order; without a tag, all to the first turn.

    Args:
        seen: there is a photo before these turns, for a box in them.
    """
    tags = [turn["q"].count(IMAGE_WORD) for turn in turns]
    if not any(tags):
        tags[0] = len(names)
    if sum(tags) != len(names):
        raise DropRowError(PHOTOS_AND_TAGS, f"{sum(tags)} tags, {len(names)} photos")
    rest = iter(names)
    for turn, count in zip(turns, tags, strict=True):
        seen |= count > 0
        _place(turn, list(itertools.islice(rest, count)), seen, notes)
    return turns


def place_by_turn(items: Any, names: list[str], notes: Notes, box: dict[str, Any]) -> Turns:
    """Return turns that may have their own photos and boxes; `names` and `box` (of `box_of`) are those of the row."""
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise DropRowError("turns is not a list of objects", shown(items))
    turns = [turn_of(item, notes) | kind_of(item) | box_of(item) for item in items]
    turns[0] = box | turns[0]
    own = [image_names(item) for item in items]
    if not any(own):
        return place_photos(turns, names, notes)
    if names and own[0]:
        raise DropRowError("row and first turn both name photos", shown([names, own[0]]))
    own[0] = own[0] or names
    for number, (turn, photos) in enumerate(zip(turns, own, strict=True), start=1):
        tags = turn["q"].count(IMAGE_WORD)
        if tags not in (0, len(photos)):
            raise DropRowError(PHOTOS_AND_TAGS, f"turn {number}: {tags} tags, {len(photos)} photos")
        _place(turn, photos, any(own[:number]), notes)
    return turns


def _place(turn: dict[str, Any], names: list[str], seen: bool, notes: Notes) -> None:
    """Set the photos of a turn, at its tags or, without a tag, before its question; its box follows the last of them.

    Args:
        seen: there is a photo in this turn or an earlier one.
    """
    if "box" in turn and not seen:
        raise DropRowError("box before the first photo", shown(turn["box"]))
    if names:
        turn["images"] = names
    if IMAGE_WORD in turn["q"]:
        before, _, after = turn["q"].replace(IMAGE_WORD, IMAGE_TAG).rpartition(IMAGE_TAG)
        turn["q"] = before + IMAGE_TAG * (1 + ("box" in turn)) + after
    elif names or "box" in turn:
        turn["q"] = IMAGE_TAG * (len(names) + ("box" in turn)) + "\n" + turn["q"]
        if names:
            notes["tags_added"] = 1
