"""Plot of the losses and learning rates of a run as PNG; called by `training/run_log.py` at every save.

It uses Pillow, an existing dependency: two line charts do not need matplotlib and its six packages.
"""

import io
import math
from typing import Any

from PIL import Image, ImageDraw

from evaluation.report import Font, text_font

Points = list[tuple[float, float]]

_SIZE = (1000, 680)  # pixels of the PNG; drawn at twice this size and scaled down, which smooths the lines
_LEFT, _RIGHT = 90, 970
_PANELS = {"loss": (80, 420), "learning rate": (500, 610)}  # top and bottom edges
_PAPER, _INK, _GREY, _GRID = "#ffffff", "#111827", "#6b7280", "#e5e7eb"
_COLOURS = {
    "training loss": "#bfdbfe",
    "smoothed": "#1d4ed8",
    "validation loss": "#c2410c",
    # learning rates, by trained part
    "projector": "#1d4ed8",
    "lora": "#15803d",
    "llm": "#86198f",
    "vision": "#b45309",
    "vision_lora": "#0e7490",
    "another part": "#475569",
}
_MARKED = {"validation loss"}  # few points: each gets a dot
SMOOTHING = 0.8  # weight of the past in the moving average; TensorBoard calls it smoothing


def draw_curves(entries: list[dict[str, Any]], title: str) -> bytes:
    """Draw the curves of a run.

    Args:
        entries: lines of `metrics.jsonl`; figures that are missing or null leave a gap.
        title: name of the run.

    Returns:
        A PNG file: training loss with its moving average and validation loss above, learning rates below, over steps.
    """
    loss = _points(entries, "loss")
    rates = dict.fromkeys(name for entry in entries for name in entry if name.endswith("_lr"))
    panels = {
        "loss": {
            "training loss": loss,
            "smoothed": smoothed(loss),
            "validation loss": _points(entries, "val_loss"),
        },
        "learning rate": {name.removesuffix("_lr"): _points(entries, name) for name in rates},
    }
    canvas = _Canvas()
    if canvas.chinese or title.isascii():
        canvas.text((_LEFT, 16), title, _INK, "la", 24)
    steps = [entry["step"] for entry in entries]
    for name, curves in panels.items():
        _draw_panel(canvas, name, curves, (min(steps, default=0), max(steps, default=1)))
    canvas.text(((_LEFT + _RIGHT) / 2, _SIZE[1] - 34), "step", _GREY, "ma")
    return canvas.png()


def smoothed(points: Points, weight: float = SMOOTHING) -> Points:
    """Exponential moving average of the values, corrected for its start."""
    average, total, result = 0.0, 0.0, []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        total = weight * total + (1 - weight)
        result.append((x, average / total))
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that enclose `low` and `high`; their distance is 1, 2 or 5 times 10^n."""
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]


def _points(entries: list[dict[str, Any]], name: str) -> Points:
    values = ((entry["step"], entry.get(name)) for entry in entries)
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


class _Canvas:
    """White canvas with coordinates in the units of `_SIZE`."""

    scale = 2

    def __init__(self) -> None:
        self.image = Image.new("RGB", (_SIZE[0] * self.scale, _SIZE[1] * self.scale), _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.chinese = text_font(16)[1]
        self._fonts: dict[int, Font] = {}

    def text(self, corner: tuple[float, float], text: str, ink: str, anchor: str, size: int = 16) -> float:
        """Draw `text` and return its width."""
        if size not in self._fonts:
            self._fonts[size] = text_font(size * self.scale)[0]
        font = self._fonts[size]
        self.draw.text((corner[0] * self.scale, corner[1] * self.scale), text, ink, font, anchor=anchor)
        return self.draw.textlength(text, font) / self.scale

    def line(self, points: Points, ink: str, width: int) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, ink, width * self.scale, joint="curve")

    def dot(self, centre: tuple[float, float], ink: str, radius: float) -> None:
        self.draw.circle((centre[0] * self.scale, centre[1] * self.scale), radius * self.scale, ink)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.resize(_SIZE, Image.Resampling.LANCZOS).save(file, format="PNG")
        return file.getvalue()


def _draw_panel(canvas: _Canvas, name: str, curves: dict[str, Points], steps: tuple[int, int]) -> None:
    top, bottom = _PANELS[name]
    values = [y for points in curves.values() for _, y in points]
    y_ticks = ticks(min(values, default=0.0), max(values, default=1.0), 5 if bottom - top > 200 else 3)
    low, high = y_ticks[0], y_ticks[-1]
    first, last = steps
    x_ticks = [tick for tick in ticks(first, last, 8) if first <= tick <= last and tick == round(tick)]
    span = max(last - first, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - first) / span * (_RIGHT - _LEFT), bottom - (y - low) / (high - low) * (bottom - top)

    for tick in y_ticks:
        y = place(first, tick)[1]
        canvas.line([(_LEFT, y), (_RIGHT, y)], _GRID, 1)
        canvas.text((_LEFT - 10, y), f"{tick:.4g}" if abs(tick) > (high - low) / 1e6 else "0", _GREY, "rm")
    for tick in x_ticks:
        canvas.text((place(tick, low)[0], bottom + 8), f"{tick:.0f}", _GREY, "ma")
    x = _LEFT + canvas.text((_LEFT, top - 28), name, _INK, "la") + 30
    for label, points in curves.items():
        if not points:
            continue
        ink = _COLOURS.get(label, _COLOURS["another part"])
        canvas.line([(x, top - 18), (x + 26, top - 18)], ink, 3)
        x += 34 + canvas.text((x + 34, top - 28), label, _GREY, "la") + 26
        placed = [place(*point) for point in points]
        canvas.line(placed, ink, 2)
        if label in _MARKED or len(placed) == 1:
            for centre in placed:
                canvas.dot(centre, ink, 4)
