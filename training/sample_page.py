"""HTML of `samples.html`: one file without scripts or requests; written by `training/samples.py`."""

import html
from dataclasses import dataclass, field

from evaluation.web_page import paragraph, show_thumbnails, whole_page

NEWEST = 5  # answers of a question that are shown; earlier ones are folded


@dataclass(frozen=True)
class Attempt:
    """Answer of the model at one evaluation; if `failed`, the error message."""

    text: str
    right: bool = False
    failed: bool = False


@dataclass
class ShownQuestion:
    """One question of the page. `pictures` are data URIs, or error messages of unreadable photos."""

    key: str  # identifies the question after a resume
    source: str
    type: str
    pictures: list[str]
    question: str
    truths: tuple[str, ...]
    attempts: dict[int, Attempt] = field(default_factory=dict)  # by step


def render_page(run: str, samples: list[ShownQuestion], held_out: bool) -> str:
    """Return the whole page."""
    steps = sorted({step for sample in samples for step in sample.attempts})
    if held_out:
        note = f"{len(samples)} questions of the validation set, which the model is not trained on."
    else:
        note = (
            f"There is no validation set (data.val_fraction): these {len(samples)} questions are of the training set, "
            "so answers may be learned by heart."
        )
    if steps:
        note += f" Answers up to step {steps[-1]}, the newest first."
    cards = "\n".join(map(_card, samples))
    return whole_page(
        f"{run}: samples",
        f'<h1>{html.escape(run)}</h1>\n<p class="note">{html.escape(note)}</p>\n<main class="cards">\n{cards}\n</main>',
    )


def _card(sample: ShownQuestion) -> str:
    kind = sample.source if sample.type == sample.source else f"{sample.source}, {sample.type}"
    newest_first = sorted(sample.attempts.items(), reverse=True)
    earlier = newest_first[NEWEST:]
    unfold = f"<details><summary>{len(earlier)} earlier</summary>{_table(earlier)}</details>" if earlier else ""
    return (
        f"<article>{show_thumbnails(sample.pictures)}{paragraph(sample.question, 'question')}"
        f"{paragraph('truth: ' + ' / '.join(dict.fromkeys(sample.truths)))}"
        f"{_table(newest_first[:NEWEST])}{unfold}"
        f'<p class="kind">{html.escape(kind)}</p></article>'
    )


def _table(attempts: list[tuple[int, Attempt]]) -> str:
    rows = []
    for step, attempt in attempts:
        # no mark for wrong answers, because a good caption rarely equals a reference
        style, mark = ("failed", "") if attempt.failed else ("right", "✓ ") if attempt.right else ("", "")
        shown = html.escape(attempt.text) or "(no answer)"
        rows.append(f'<tr><th>step {step}</th><td class="text {style}">{mark}{shown}</td></tr>')
    return f"<table>{''.join(rows)}</table>" if rows else ""
