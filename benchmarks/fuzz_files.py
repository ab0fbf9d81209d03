"""File cases of `benchmarks/fuzz.py`: mutated annotations and damaged photos; mutation of values and bytes.

A case takes (draw, an empty folder) and returns its outcome in one word. It does not catch exceptions of the product,
and raises `FoundError` for a failure without an exception.
"""

import contextlib
import copy
import functools
import io
import json
import os
import random
from pathlib import Path
from typing import Any

from PIL import Image

from config import IMAGE_TAG, Data
from dataset.records import read_records, write_records
from errors import UserError
from paths import resolve_path
from process_image import process_sources


class FoundError(Exception):
    """A failure without an exception of the product; `kind` is a key of `benchmarks.fuzz.FAILURES`."""

    def __init__(self, kind: str, details: object) -> None:
        super().__init__(str(details))
        self.kind = kind


DEEP = "\N{BALLOT X}deep"  # replaced by 3,000 nested lists, which JSON and YAML writers cannot write
CONTROL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", IMAGE_TAG, "<|extra_1|>"]
CONTROL += ["<think>", "</think>", "<tool_call>"]  # not special tokens, see qwen/tokenizer.py
NAMES = ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png", "C:\\x.png", "b\0.png", "x" * 300, "."]
NUMBERS = [0, -1, 1e308, -1e-320, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), True]
TEXTS = ["", " ", "\u200b", "\ud800", "null", "2026-02-31", "yes", "图", "<image>", "<image><image>", *CONTROL]
JUNK: list[Any] = [None, [], {}, [[]], {"": None}, DEEP, "y" * 100_000, *NUMBERS, *TEXTS, *NAMES]


# --- annotations ------------------------------------------------------------------------------------------------------


def _dialogue(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


PHOTOS = ["0.png", "1.png", "2.png"]
LLAVA = [
    {"id": "a", "image": "0.png", "conversations": _dialogue("<image>\nWhat?", "A dog.")},
    {"id": "b", "image": "0.png", "conversations": [*_dialogue("Where?\n<image>", "Here."), *_dialogue("Why?", "So.")]},
    {"id": "c", "image": ["1.png", "2.png"], "conversations": _dialogue("<image><image>\nSame?", "No.")},
    {"id": "d", "conversations": _dialogue("Hello", "Hi")},
    {
        "id": "e",
        "image": ["0.png", "2.png", "1.png"],
        "conversations": [
            *_dialogue("Hello", "Hi"),
            *_dialogue("<image>\nWhat?", "A dog."),
            *_dialogue("<image> or <image>?", "Both."),
        ],
    },
    {"id": "f", "images": ["1.png"], "conversations": [*_dialogue("Why?", "So."), *_dialogue("Where?", "Here.")]},
]
JSONL: list[dict] = [{"image": name, "question": "What?", "answer": "a dog", "type": "t"} for name in PHOTOS]
JSONL += [
    {
        "image": "0.png",
        "turns": [
            {"question": "What?", "answer": ["a dog", "a cat"]},
            {"q": "<image><image>Same?", "a": "no", "images": ["1.png", "0.png"], "type": "same"},
            {"q": "And this?", "a": "a dog", "image": "2.png"},
        ],
    },
    {"images": PHOTOS, "turns": [{"q": "<image>?", "a": "one"}, {"q": "<image> and <image>?", "a": "two"}]},
    {"turns": [{"q": "Hello", "a": "Hi"}, {"q": "What?", "a": "a dog", "image": "1.png"}]},
]
COCO_ID = {"0.png": 0, "1.png": 1, "2.png": 2}
# format → valid (annotations, questions or None)
SOUND: dict[str, tuple[Any, Any]] = {
    "ai_challenger": ([{"url": "u", "image_id": name, "caption": ["一只狗", "狗在跑"]} for name in PHOTOS], None),
    "llava": (LLAVA, None),
    "jsonl": (JSONL, None),
    "coco_captions": (
        {
            "images": [{"id": ID, "file_name": name} for name, ID in COCO_ID.items()],
            "annotations": [{"id": n, "image_id": n % 3, "caption": f"A dog {n}."} for n in range(5)],
        },
        None,
    ),
    "vqav2": (
        {
            "annotations": [
                {"question_id": n, "image_id": n % 3, "answer_type": "other", "answers": [{"answer": "yes"}] * 2}
                for n in range(4)
            ]
        },
        {"questions": [{"question_id": n, "image_id": n % 3, "question": f"Which {n}?"} for n in range(4)]},
    ),
}
PARTS = {  # lists with at least one row per item
    "coco_captions": ["images", "annotations"],
    "vqav2": ["questions", "annotations"],
}


def annotations(draw: random.Random, folder: Path) -> str:
    """Read a mutated annotation file of one format, write the records, and read them back."""
    kind = draw.choice(list(SOUND))
    (folder / "photos").mkdir()
    for name in ["photos/" + photo for photo in PHOTOS] + ["secret.png", "photos/000000000001.jpg"]:
        (folder / name).write_bytes(_png())
    main, questions = copy.deepcopy(SOUND[kind])
    source = {"name": "s", "format": kind, "annotations": str(folder / "a.json"), "images": str(folder / "photos")}
    contents = [(folder / "a.json", main)]
    if questions is not None:
        source["questions"] = str(folder / "q.json")
        contents.append((folder / "q.json", questions))
    chosen = draw.randrange(len(contents))
    for index, (file, content) in enumerate(contents):
        sound = index != chosen or draw.random() < 0.6
        if index == chosen and draw.random() < 0.8:
            for _ in range(draw.randint(1, 4)):
                content = mutate(draw, content)
        data = _dump(content, lines=kind == "jsonl")
        file.write_bytes(data if sound else mutate_bytes(draw, data))
    # "open" starts worker processes, which takes seconds
    check = draw.choices(["none", "exists", "open"], [30, 69, 1])[0]
    image_map, captions, reports, *_ = process_sources(
        Data.model_validate({"sources": [source], "check_images": check})
    )
    for report in reports:
        dropped = sum(entry["count"] for entry in report.dropped.values())
        expected = _count_rows(kind, [file for file, _ in contents])
        if report.kept + dropped != report.rows or (expected is not None and report.rows < expected):
            raise FoundError(
                "unaccounted", f"{kind}: {expected} rows in the file, {report.rows} read, {report.kept} kept, {dropped}"
            )
    inside = os.path.abspath(folder / "photos") + os.sep
    for key, photo in image_map.items():
        if not os.path.abspath(resolve_path(photo["path"])).startswith(inside) or ".." in Path(key).parts:
            raise FoundError("escaped", f"{key!r}: {photo['path']!r}")
    if not captions:
        return "no row left"
    write_records(image_map, captions, folder / "image_map.json", folder / "captions.json")
    try:
        known, entries = read_records(folder / "image_map.json", folder / "captions.json")
    except UserError as error:
        raise FoundError("unaccounted", f"{kind}: what was written is refused: {error}") from error
    lost = known.keys() - {ID for entry in entries for ID in entry.images}
    if lost:
        raise FoundError("unaccounted", f"{kind}: no entry shows the photos {lost}")
    back = len(entries)
    if kind == "coco_captions":  # each caption is a row, but all captions of a photo are answers of one entry
        back = sum(len(entry.turns[0].answers) for entry in entries)
    if back != sum(report.kept for report in reports):
        raise FoundError("unaccounted", f"{kind}: {back} rows read back of {[report.kept for report in reports]} kept")
    return "read"


def mutate(draw: random.Random, value: Any) -> Any:
    """Return `value` with one random change: a key or item lost, doubled, renamed, of another type, or junk."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:  # go deeper
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        return _change(draw, value, key) if draw.random() < 0.4 else _replace(value, key, mutate(draw, value[key]))
    return draw.choice([*JUNK, [value], {"value": value}, str(value), copy.deepcopy(value)])


def _change(draw: random.Random, value: Any, key: Any) -> Any:
    change = draw.choice(["delete", "double", "rename", "swap"])
    if isinstance(value, list):
        items = [*value]
        if change == "delete":
            del items[key]
        elif change == "double":
            items.insert(draw.randrange(len(items) + 1), copy.deepcopy(items[key]))
        else:
            draw.shuffle(items)
        return items
    result = dict(value)
    if change == "delete":
        del result[key]
    elif change == "swap":
        other = draw.choice(list(value))
        result[key], result[other] = value[other], value[key]
    else:
        result[
            draw.choice(
                ["image", "images", "image_id", "id", "question_id", "caption", "turns", "q", "a", "type", "", "图"]
            )
        ] = copy.deepcopy(value[key]) if change == "double" else result.pop(key)
    return result


def _replace(value: Any, key: Any, new: Any) -> Any:
    result = copy.copy(value)
    result[key] = new
    return result


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return `data` with random damage: flipped bits, truncation, a piece doubled or lost, junk, or re-encoding."""
    damaged = bytearray(data)
    low, high = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    damage = draw.choice(["flip", "cut", "lose", "double", "junk", "encoding"])
    if damage == "flip" and data:
        for _ in range(draw.choice([1, 3, 30])):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    elif damage == "cut":
        del damaged[low:]
    elif damage == "lose":
        del damaged[low : min(high, low + 20)]
    elif damage == "double":
        damaged[high:high] = damaged[low:high]
    elif damage == "junk":
        damaged[low:low] = draw.choice(
            [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 2000, b"\r\n\r\n", b'"', b"9" * 5000]
        )
    elif damage == "encoding":
        encoding = draw.choice(["utf-16", "utf-16-le", "utf-8-sig", "gb18030", "utf-32", "cp1252"])
        return data.decode("utf-8", "replace").encode(encoding, "replace")
    return bytes(damaged)


def _dump(content: Any, lines: bool = False) -> bytes:
    rows = content if lines and isinstance(content, list) else [content]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)
    return text.replace("\ud800", "\\ud800").encode("utf-8")  # half a surrogate pair is valid JSON only when escaped


def _count_rows(kind: str, files: list[Path]) -> int | None:
    """Count the least number of rows in the files, independent of the product; None if unknown."""
    try:
        if kind == "jsonl":
            return sum(bool(line.strip()) for line in files[0].read_text("utf-8-sig").split("\n"))
        parsed = [json.loads(file.read_text("utf-8-sig")) for file in files]
    except (ValueError, RecursionError):
        return None
    if kind not in PARTS:
        return len(parsed[0]) if isinstance(parsed[0], list) else None
    lists = [content.get(part) for content in parsed if isinstance(content, dict) for part in PARTS[kind]]
    return max((len(items) for items in lists if isinstance(items, list)), default=None)


# --- photos -----------------------------------------------------------------------------------------------------------

FORMATS = "AVIF BMP DDS DIB EPS GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PALM PCX PDF PNG PPM QOI SGI SPIDER TGA TIFF WEBP"
MODES = ["RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "LA", "F", "I", "YCbCr", "LAB"]
SUFFIXES = [".jpg", ".png", ".gif", ".tif", ".webp", ".eps", ".pdf", ".txt", "", ".图"]


def photos(draw: random.Random, folder: Path) -> str:
    """Read a damaged or unusual photo with `load_image` and apply both kinds of transform."""
    from visual.transform import load_image

    programs = folder / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c", "convert", "ffmpeg"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> '{folder}/started'\nexit 1\n")
        (programs / name).chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        picture = load_image(_strange_file(draw, folder))
    finally:
        os.environ["PATH"] = before
        if (folder / "started").exists():
            raise FoundError("foreign program", (folder / "started").read_text().strip())
    for transform in _transforms():
        pixels = transform(picture)
        assert pixels.shape == (3, *transform.size), pixels.shape
        assert bool(pixels.isfinite().all()), "pixels that are no numbers"
    return "read"


def _strange_file(draw: random.Random, folder: Path) -> str | Path:
    file = folder / f"photo{draw.choice(SUFFIXES)}"
    what = draw.randrange(20)
    if what == 0:
        return draw.choice(
            [str(folder / ("n" * 300)), str(folder / "a\0b"), str(folder / "\ud800"), folder, "", "/", "."]
        )
    if what == 1 and hasattr(os, "mkfifo"):
        os.mkfifo(file)
        return file
    if what == 2 and os.name == "posix":
        file.symlink_to(draw.choice(["/dev/zero", "/dev/null", file.name, "nowhere"]))
        return file
    if what == 3:
        file.write_bytes(
            draw.choice([b"", b"\0", b"text", b"%PDF-1.4", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", _bomb(draw)])
        )
        return file
    data = _encoded(draw)
    if what > 6:
        data = mutate_bytes(draw, data) if draw.random() < 0.8 else mutate_bytes(draw, data[:100]) + data[100:]
    file.write_bytes(data)
    return file


def _encoded(draw: random.Random) -> bytes:
    """Encode a small picture of random size, mode and format; replace modes that the format does not support."""
    size, kind, mode = (
        draw.choice([(24, 16), (1, 1), (1, 500), (64, 48)]),
        draw.choice(FORMATS.split()),
        draw.choice(MODES),
    )
    options = draw.choice([{}, {}, {"quality": 5}, {"exif": b"Exif\0\0MM"}])
    for attempt in (mode, "RGB", "L", "1"):
        picture = Image.new(attempt, size, 1)
        with contextlib.suppress(Exception):  # Pillow raises various errors for unsupported modes
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            return buffer.getvalue()
    return _png()


def _bomb(draw: random.Random) -> bytes:
    """Return a file header with up to 4 billion pixels and no pixel data."""
    width, height = draw.choice([(60_000, 60_000), (13_000, 13_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 5)])
    if draw.random() < 0.5:
        return b"P6 %d %d 255\n" % (width, height)
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(data)


@functools.cache
def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def _transforms() -> list:
    from visual.transform import PROCESSORS, ImageTransform

    square = {"height": 28, "width": 28}
    siglip = PROCESSORS["SiglipImageProcessor"](size=square)
    clip = PROCESSORS["CLIPImageProcessor"](size={"shortest_edge": 28}, crop_size=square)
    return [ImageTransform(siglip), ImageTransform(clip)]
