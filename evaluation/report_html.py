"""The page `report.html` of an evaluation: what to believe first, then scores, curves, examples, and what was run."""

import html
import random
from collections.abc import Iterable, Mapping
from typing import Any

from dataset.records import Photo
from evaluation.baselines import BASELINES, TRAINED
from evaluation.compare import Comparison
from evaluation.intervals import Interval
from evaluation.passes import Evaluation
from evaluation.report import NO_BLEU, compared_line, judged_cells, looks_line, missing, rows, text_cells
from evaluation.runner import Answer
from evaluation.scores import ACCURACY, CIDER_D, F1
from evaluation.web_page import paragraph, read_thumbnail, show_thumbnails, whole_page

MOST_TYPES = 12  # of which examples are shown, those with most questions
OF_EACH = 2  # examples of a type that are right, and that are wrong
MOST_FLIPS = 6  # answers shown that only one of two models has right, each way
THUMBNAIL = 320  # pixels of the longer edge
_CUT = {"words": "texts cut into words", "characters": "Chinese cut into characters, English into words"}
_PLOT = (240, 150)  # size of a curve's picture, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 12, 24  # margins in it

_STYLE = """
h2 { font-size: 1.15rem; margin: 32px 0 8px; } h3 { font-size: 1rem; margin: 24px 0 8px; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--wrong); background: var(--card); padding: 12px 16px; margin: 12px 0;
  font-weight: 600; overflow-wrap: anywhere; }
.verdict.looks { border-color: var(--right); } .verdict.open { border-color: var(--grey); }
.bars { display: grid; grid-template-columns: minmax(6rem, 40%) 1fr 3.5rem; gap: 6px 8px; max-width: 680px;
  align-items: center; }
.bar { background: var(--rule); border-radius: 4px; height: 14px; }
.bar div { background: var(--mark); border-radius: 4px; height: 14px; }
.bar.less div { background: var(--grey); } .number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; font-size: .875rem; } .scroll table { width: auto; min-width: min(100%, 480px); }
.scroll td, .scroll th { white-space: nowrap; padding-right: 16px; }
.scroll td { text-align: right; font-variant-numeric: tabular-nums; } .scroll th { text-align: left; width: auto; }
.scroll thead th { text-align: right; } .scroll tr > :first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); max-width: 45vw; overflow: hidden; text-overflow: ellipsis; }
.scroll tr:last-child > * { font-weight: 600; }
.curves { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.curves figure { margin: 0; max-width: 380px; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--grey); font-size: 11px; } .grid { stroke: var(--rule); }
.band { fill: var(--mark); opacity: .18; } .line { fill: none; stroke: var(--mark); stroke-width: 2; }
.dot { fill: var(--mark); } .floor { stroke: var(--grey); stroke-dasharray: 4 4; }
figcaption { font-weight: 600; } .wrong { color: var(--wrong); } .said { color: var(--mark); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; overflow-wrap: anywhere; }
dt { color: var(--grey); } dd { margin: 0; }
article table { font-size: .875rem; margin-bottom: 8px; } .cards { grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 250px), 1fr)); } img { max-height: 220px; }
article table th, details table th { white-space: normal; width: 35%; overflow-wrap: anywhere; }
article td, details td { overflow-wrap: anywhere; }
"""


def render_report(
    found: Evaluation, compared: Comparison | None, photos: Mapping[int, Photo], run: dict[str, Any]
) -> str:
    """Return the page.

    Args:
        photos: by ID.
        run: what was run, name → value; `checkpoint` is the title.
    """
    gain = found.gain
    kind = "open" if gain is None else "looks" if gain.low > 0 else ""
    verdict = looks_line(found)
    parts = [
        f"<h1>{html.escape(str(run['checkpoint']))}: evaluation</h1>",
        f'<p class="verdict {kind}">{html.escape(verdict[0].upper() + verdict[1:])}.</p>',
        _bars(found),
        _scores(found),
        _curves(found),
        _comparison(compared, photos) if compared else "",
        _examples(found, photos),
        _facts(run),
    ]
    return whole_page(f"{run['checkpoint']}: evaluation", "\n".join(filter(None, parts)), _STYLE)


def _bars(found: Evaluation) -> str:
    """The score that judges, of all questions in each pass."""
    lines = []
    full = max(1.0, *(result.overall.judged.score for result in found.results.values()))  # CIDEr-D may pass 1
    for name, result in found.results.items():
        score, low, high = result.overall.judged
        label = "with its own photo" if name == TRAINED else BASELINES[name]
        lines.append(
            f'<div>{label}</div><div class="bar {"" if name == TRAINED else "less"}">'
            f'<div style="width: {100 * score / full:.1f}%"></div></div>'
            f'<div class="number" title="95 % interval {low:.3f} to {high:.3f}">{score:.3f}</div>'
        )
    overall = found.results[TRAINED].overall
    _, low, high = overall.judged
    note = f"{overall.questions} questions; 95 % interval of the first: {low:.3f} to {high:.3f}."
    note += {
        ACCURACY: "",
        CIDER_D: " True answers are sentences, so CIDEr-D judges (0 to 10); hardly an answer equals one word for word.",
        F1: " Some sources have short answers and some have sentences, so the share of words in common with the best "
        "true answer (F1) judges all together; below, accuracy or CIDEr-D judges each source.",
    }[found.measure]
    title = found.measure[0].upper() + found.measure[1:]
    return f'<h2>{title}</h2>\n<div class="bars">{"".join(lines)}</div>\n<p class="note">{note}</p>'


def _scores(found: Evaluation) -> str:
    names = [name for name in found.results if name != TRAINED]
    scored = rows(found.results)
    labels = ["", *(row.label for row in scored)]
    cells = zip(labels, judged_cells(scored), text_cells(scored), strict=True)
    head, *lines = [[label, *judged, *texts] for label, judged, texts in cells]
    notes = [f"{name}: {meaning}." for name, meaning in BASELINES.items() if name in names]
    cut = next(iter(found.results[TRAINED].overall.captions))
    notes.append(
        f"BLEU-4, ROUGE-L and CIDEr-D are those of the COCO caption scorer ({_CUT[cut]}; CIDEr-D counts how rare words "
        "are among the references of the row). METEOR and SPICE are not computed."
    )
    notes += [f"{note[0].upper()}{note[1:]}." for note in missing(scored)]
    if found.results[TRAINED].overall.loss is not None:
        notes.append("loss: of the true answers, in nats per token; ppl: perplexity, its exponential.")
    if any(name in ("DAQUAR", "WUPS") for name in head):
        notes.append("DAQUAR, WUPS: its accuracy, and WUPS@0.9, of answers as lists of things.")
    common = [[type_, answer, origin] for type_, (answer, origin) in found.majority.items()]
    origins = {"train": "training part", "scored": "these questions"}
    majority = "".join(
        f"<tr><th>{html.escape(type_)}</th><td class='text'>{html.escape(answer)}</td><td>{origins[origin]}</td></tr>"
        for type_, answer, origin in common
    )
    unfold = (
        f"<details><summary>The most frequent answer of each type</summary><table>{majority}</table></details>"
        if common
        else ""
    )
    note = f'<p class="note">{html.escape(" ".join(notes))}</p>'
    return f"<h2>Scores</h2>\n{_table(head, lines)}\n{note}{_all_intervals(found)}{unfold}"


def _all_intervals(found: Evaluation) -> str:
    """All scores of all questions with their intervals, to unfold."""
    lines = [
        [name, f"{own.score:.3f}", f"{own.low:.3f}–{own.high:.3f}"]
        for name, own in found.intervals.items()
        if not (name.startswith("BLEU") and own.score <= NO_BLEU)
    ]
    table = _table(["", "all questions", "95 % interval"], lines)
    return f"<details><summary>Scores of all questions with their 95 % intervals</summary>{table}</details>"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table that scrolls sideways by itself, with its first column in place."""

    def cells(tag: str, texts: list[str]) -> str:
        first, *rest = map(html.escape, texts)
        return f"<tr><th>{first}</th>{''.join(f'<{tag}>{text}</{tag}>' for text in rest)}</tr>"

    body = "".join(cells("td", line) for line in lines)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'
    )


def _curves(found: Evaluation) -> str:
    """The score by strength of each distortion."""
    if not found.hard:
        return ""
    clear = next(iter(found.hard.values()))[0]
    floor = None if found.gain is None else clear.score - found.gain.score
    highest = max(point.high for points in found.hard.values() for point in points)
    top = next(top for top in (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0) if highest <= top + 1e-9)
    figures = "".join(
        f"<figure><figcaption>{html.escape(kind)}</figcaption>{draw_curve(points, floor, top, found.measure)}</figure>"
        for kind, points in found.hard.items()
    )
    title = found.measure[0].upper() + found.measure[1:]
    note = f"{title} of the questions with a photo, by strength of its distortion (0: none), with 95 % intervals."
    if floor is not None:
        note += " Dashed: with another photo."
    return f'<h2>Hard photos</h2>\n<p class="note">{note}</p>\n<div class="curves">{figures}</div>'


def draw_curve(points: list[Interval], floor: float | None, top: float, measure: str) -> str:
    """An SVG of the score `measure` by strength, from 0; `floor` is a dashed line, `top` the highest score drawn."""
    width, height = _PLOT

    def x(strength: int) -> float:
        return _LEFT + strength * (width - _LEFT - _RIGHT) / (len(points) - 1)

    def y(score: float) -> float:
        return height - _BOTTOM - score / top * (height - _TOP - _BOTTOM)

    def line(curve: Iterable[tuple[int, float]]) -> str:
        return " ".join(f"{x(strength):.1f},{y(score):.1f}" for strength, score in curve)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{_LEFT - 4}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in (0.0, top / 2, top)
    ]
    parts += [
        f'<text x="{x(strength):.1f}" y="{height - 8}" text-anchor="middle">{strength}</text>'
        for strength in range(len(points))
    ]
    upper = [(strength, point.high) for strength, point in enumerate(points)]
    lower = [(strength, point.low) for strength, point in enumerate(points)]
    parts.append(f'<polygon class="band" points="{line([*upper, *reversed(lower)])}"/>')
    if floor is not None:
        parts.append(
            f'<line class="floor" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>'
        )
    scores = [(strength, point.score) for strength, point in enumerate(points)]
    parts.append(f'<polyline class="line" points="{line(scores)}"/>')
    parts += [
        f'<circle class="dot" cx="{x(strength):.1f}" cy="{y(score):.1f}" r="3">'
        f"<title>strength {strength}: {score:.3f}</title></circle>"
        for strength, score in scores
    ]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{measure} by strength">{"".join(parts)}</svg>'


def _comparison(compared: Comparison, photos: Mapping[int, Photo]) -> str:
    sentence = compared_line(compared)
    head = ["", "difference", "95 % interval"]
    lines = [
        [type_, f"{gain.score:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}"]
        for type_, gain in [*compared.by_type.items(), ("all", compared.difference)]
    ]
    parts = [
        f"<h2>Beside {html.escape(compared.name)}</h2>\n<p>{html.escape(sentence[0].upper() + sentence[1:])}.</p>",
        _table(head, lines),
        '<p class="note">The test takes questions as independent. Where a photo has many of them, believe the '
        "interval, which resamples photos.</p>",
    ]
    word = "Right only" if compared.measure == ACCURACY else "Better"
    for title, flips in {f"{word} here": compared.gained, f"{word} in {compared.name}": compared.lost}.items():
        shown = _draw(flips, MOST_FLIPS)
        cards = "".join(
            _card(here, {compared.name: there}, photos, here.source in compared.sentences) for here, there in shown
        )
        count = f"{len(flips)}" if len(shown) == len(flips) else f"{len(shown)} of {len(flips)}"
        parts.append(f'<h3>{html.escape(title)} ({count})</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _examples(found: Evaluation, photos: Mapping[int, Photo]) -> str:
    """Right and wrong answers of each type, with what the model answers without the photo."""
    others = {
        meaning: {(answer.entry, answer.turn): answer for answer in found.answers[name]}
        for name, meaning in BASELINES.items()
        if name in found.answers and name in ("blind", "text")
    }
    by_type: dict[str, list[Answer]] = {}
    for answer in found.answers[TRAINED]:
        by_type.setdefault(answer.type, []).append(answer)
    most = sorted(by_type, key=lambda type_: -len(by_type[type_]))[:MOST_TYPES]
    parts = ["<h2>Examples</h2>"]
    if len(most) < len(by_type):
        parts.append(f'<p class="note">Of the {len(most)} types with most questions, out of {len(by_type)}.</p>')
    for type_ in sorted(most):
        right, wrong = ([a for a in by_type[type_] if a.right is wanted] for wanted in (True, False))
        if any(answer.source in found.sentences for answer in by_type[type_]):
            shown, count = _draw(by_type[type_], 2 * OF_EACH), f"{len(by_type[type_])} answers"
        else:
            shown = [*_draw(right, OF_EACH), *_draw(wrong, OF_EACH)]
            count = f"{len(right)} right, {len(wrong)} wrong"
        cards = "".join(
            _card(
                answer,
                {name: same[answer.entry, answer.turn] for name, same in others.items() if answer.images},
                photos,
                answer.source in found.sentences,
            )
            for answer in shown
        )
        parts.append(f'<h3>{html.escape(type_)} ({count})</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _draw(items: list[Any], count: int) -> list[Any]:
    """Draw `count` items, always the same ones; their order stays."""
    numbers = random.Random(0).sample(range(len(items)), min(count, len(items)))
    return [items[number] for number in sorted(numbers)]


def _card(answer: Answer, others: dict[str, Answer], photos: Mapping[int, Photo], sentences: bool) -> str:
    """A question with photo, truth and answer; `others` are answers to the same question, by who gave them."""
    marked = _plain if sentences else _marked
    pictures = show_thumbnails([read_thumbnail(photos[ID], THUMBNAIL) for ID in answer.images])
    partly = f" (accuracy {answer.accuracy:.2f})" if 0 < answer.accuracy < 1 else ""
    truths = " / ".join(dict.fromkeys(answer.references))
    lines = "".join(
        f"<tr><th>{html.escape(name)}</th><td class='text'>{marked(other)}</td></tr>" for name, other in others.items()
    )
    table = f"<table>{lines}</table>" if lines else ""
    cut = " · the answer was cut off" if answer.finish_reason == "length" else ""
    return (
        f"<article>{pictures}{paragraph(answer.question, 'question')}{paragraph('truth: ' + truths)}"
        f'<p class="text" dir="auto">{marked(answer)}{partly}</p>{table}'
        f'<p class="kind">source: {html.escape(answer.source)}{cut}</p></article>'
    )


def _plain(answer: Answer) -> str:
    """The answer in a colour of its own, since a sentence is neither right nor wrong."""
    return f'<span class="said">{html.escape(answer.answer) or "(no answer)"}</span>'


def _marked(answer: Answer) -> str:
    """The answer with a tick or a cross."""
    style, mark = ("right", "✓") if answer.right else ("wrong", "✗")
    return f'<span class="{style}">{mark} {html.escape(answer.answer) or "(no answer)"}</span>'


def _facts(run: dict[str, Any]) -> str:
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in run.items())
    return f"<h2>What was run</h2>\n<dl>{lines}</dl>"
