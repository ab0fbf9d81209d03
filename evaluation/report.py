"""Reports of `evaluation/runner.py`'s results: a text table, a JSON file and a PNG with eight held-out photos."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dataset.records import Photo, write_json_files
from evaluation.intervals import Interval
from evaluation.runner import Answer, Result, Score
from visual.transform import load_image

# Fonts with Chinese characters of Linux distributions, macOS and Windows, and the index of the font in its file.
_CJK_FONTS = {
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc": 2,  # 0 and 1 have Japanese and Korean forms
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc": 2,
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc": 2,
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc": 0,
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc": 0,
    "/System/Library/Fonts/PingFang.ttc": 0,
    "/System/Library/Fonts/STHeiti Light.ttc": 0,
    "C:/Windows/Fonts/msyh.ttc": 0,
    "C:/Windows/Fonts/simhei.ttf": 0,
}
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_COLUMNS, _ROWS = 4, 2
_PHOTO, _TEXT_HEIGHT, _GAP, _MARK = 320, 150, 16, 22  # pixels
_RIGHT, _WRONG, _INK, _GREY, _PAPER = "#15803d", "#b91c1c", "#111827", "#6b7280", "#ffffff"


def table(trained: Result, blind: Result | None) -> str:
    """Return a text table with one line per question type and one for all (Chinese characters are two wide)."""
    header = ["type", "questions", "accuracy"] + ["blind"] * (blind is not None) + ["token F1", "BLEU-4", "chrF"]
    rows = [header]
    for name, trained_score in [*trained.by_type.items(), ("all", trained.overall)]:
        blind_score = None if blind is None else blind.overall if name == "all" else blind.by_type[name]
        rows.append(_row(name, trained_score, blind_score))
    widths = [max(map(_display_width, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([_pad(row[0], widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    rule = "-" * _display_width(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def looks_line(gain: Interval) -> str:
    """Say whether the answers depend on the photo, by the gain of `runner.visual_gain`."""
    figures = f"{gain.score:.3f} (95 % interval {gain.low:.3f} to {gain.high:.3f})"
    if gain.low > 0:
        return f"it looks at the photo: accuracy is higher by {figures} than with another photo"
    return f"no sign that it looks at the photo: accuracy differs by {figures} from that with another photo"


def _row(name: str, trained: Score, blind: Score | None) -> list[str]:
    accuracies = [f"{score.accuracy:.3f}" for score in (trained, blind) if score is not None]
    texts = [f"{trained.token_f1:.3f}", f"{trained.bleu4:.1f}", f"{trained.chrf:.1f}"]
    return [name, str(trained.questions), *accuracies, *texts]


def _display_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _display_width(text))


def write_json(file: Path, trained: Result, blind: Result | None, **facts: Any) -> None:
    """Write both passes with all questions and answers atomically; `facts` (checkpoint, split …) come first."""
    write_json_files({file: facts | {"trained": trained, "blind": blind}})


def text_font(size: int) -> tuple[Font, bool]:
    """Return a font of `size` pixels, and whether it has Chinese characters."""
    file = next((path for path in _CJK_FONTS if Path(path).is_file()), None)
    if file is None:
        return ImageFont.load_default(size), False
    return ImageFont.truetype(file, size, _CJK_FONTS[file]), True


def draw_gallery(file: Path, result: Result, photos: dict[int, Photo]) -> None:
    """Draw a PNG of eight photos with question, truth, answer, and a green tick or a red cross.

    Without a Chinese font, questions with non-ASCII text are left out.
    """
    font, chinese = text_font(16)
    answers = [answer for answer in result.answers if answer.images]
    if not chinese:
        answers = [a for a in answers if "".join([a.question, a.references[0], a.answer]).isascii()]
    page = Image.new("RGB", (_COLUMNS * (_PHOTO + _GAP) + _GAP, _ROWS * (_PHOTO + _TEXT_HEIGHT + _GAP) + _GAP), _PAPER)
    for cell, answer in enumerate(_choose(answers, _COLUMNS * _ROWS)):
        row, column = divmod(cell, _COLUMNS)
        corner = (_GAP + column * (_PHOTO + _GAP), _GAP + row * (_PHOTO + _TEXT_HEIGHT + _GAP))
        photo = load_image(photos[answer.images[0]].path)
        _draw_cell(page, corner, photo, answer, font)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file, format="PNG")


def _choose(answers: list[Answer], count: int) -> list[Answer]:
    """Choose up to `count` answers on different photos, alternating between types; right or wrong does not matter."""
    chosen: list[Answer] = []
    types = sorted({answer.type for answer in answers})
    seen: set[int] = set()
    while len(chosen) < count:
        before = len(chosen)
        for type_ in types:
            fresh = (a for a in answers if a.type == type_ and a.images[0] not in seen)
            answer = next(fresh, None)
            if answer is not None and len(chosen) < count:
                chosen.append(answer)
                seen.add(answer.images[0])
        if len(chosen) == before:
            break
    return chosen


def _draw_cell(page: Image.Image, corner: tuple[int, int], photo: Image.Image, answer: Answer, font: Font) -> None:
    draw = ImageDraw.Draw(page)
    left, top = corner
    page.paste(ImageOps.pad(photo, (_PHOTO, _PHOTO), color="#e5e7eb"), corner)
    right = answer.accuracy >= 0.5
    colour = _RIGHT if right else _WRONG
    draw.rectangle((left, top, left + _PHOTO - 1, top + _PHOTO - 1), outline=colour, width=3)
    y = top + _PHOTO + 8
    y = _draw_text(draw, (left, y), answer.question, _INK, font)
    y = _draw_text(draw, (left, y), "truth: " + answer.references[0], _GREY, font)
    _draw_mark(draw, left, y + 3, right)
    _draw_text(draw, (left + _MARK, y), answer.answer or "(no answer)", colour, font)


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    if right:
        draw.line([(x, y + 7), (x + 5, y + 13), (x + 14, y + 1)], fill=_RIGHT, width=3)
    else:
        draw.line([(x + 1, y + 1), (x + 13, y + 13)], fill=_WRONG, width=3)
        draw.line([(x + 13, y + 1), (x + 1, y + 13)], fill=_WRONG, width=3)


def _draw_text(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, ink: str, font: Font) -> int:
    """Draw `text` in at most two lines, broken at spaces or Chinese characters; return the y below it."""
    left, y = corner
    width = _PHOTO - (left - _GAP) % (_PHOTO + _GAP)
    lines = [""]
    for piece in re.findall(r"[^\s\u2e80-\uffef]+\s*|\S\s*", " ".join(text.split())):
        if lines[-1] and draw.textlength(lines[-1] + piece.rstrip(), font) > width:
            lines.append("")
        lines[-1] += piece
    if len(lines) > 2:
        lines = [lines[0], lines[1] + "…"]
    for line in lines:
        while draw.textlength(line, font) > width:
            line = line.removesuffix("…")[:-1] + "…"
        draw.text((left, y), line, ink, font)
        y += 22
    return y + 2
