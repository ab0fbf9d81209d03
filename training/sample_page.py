"""HTML of `samples.html`: one file without scripts or requests; written by `training/samples.py`."""

import html
from dataclasses import dataclass, field

NEWEST = 5  # answers of a question that are shown; earlier ones are folded

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f8fafc; --ink: #111827; --grey: #6b7280; --rule: #e5e7eb;
  --right: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #111827; --card: #1f2937; --ink: #f3f4f6; --grey: #9ca3af;
  --rule: #374151; --right: #4ade80; } }
body { margin: 0 auto; padding: 16px; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
.note, th, summary, .kind { color: var(--grey); font-size: .875rem; font-weight: normal; }
main { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 16px; min-width: 0; }
img { display: block; max-width: 100%; max-height: 320px; margin: 0 auto 8px; border-radius: 4px; }
p { margin: 0 0 8px; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { font-weight: 600; } .right { color: var(--right); }
.failed { color: var(--grey); font-style: italic; }
table { border-collapse: collapse; width: 100%; } summary { cursor: pointer; padding: 4px 0; }
th, td { border-top: 1px solid var(--rule); padding: 4px 8px 4px 0; text-align: left; vertical-align: top; }
th { white-space: nowrap; width: 1%; }
"""


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
    """Return the whole page. All texts are escaped, so HTML in questions and answers is displayed as text."""
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(run)}: samples</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(run)}</h1>\n<p class="note">{html.escape(note)}</p>\n'
        f"<main>\n{cards}\n</main>\n</body>\n</html>\n"
    )


def _card(sample: ShownQuestion) -> str:
    pictures = "".join(
        f'<img src="{html.escape(picture)}" alt="photo">' if picture.startswith("data:") else _text(picture, "failed")
        for picture in sample.pictures
    )
    kind = sample.source if sample.type == sample.source else f"{sample.source}, {sample.type}"
    newest_first = sorted(sample.attempts.items(), reverse=True)
    earlier = newest_first[NEWEST:]
    unfold = f"<details><summary>{len(earlier)} earlier</summary>{_table(earlier)}</details>" if earlier else ""
    return (
        f"<article>{pictures}{_text(sample.question, 'question')}"
        f"{_text('truth: ' + ' / '.join(dict.fromkeys(sample.truths)))}"
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


def _text(text: str, style: str = "") -> str:
    return f'<p class="text {style}" dir="auto">{html.escape(text)}</p>'
