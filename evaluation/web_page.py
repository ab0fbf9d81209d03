"""Web pages of one file each, without scripts or requests: frame, style and photos.

`report_html.py` and `training/sample_page.py` write such pages. All texts are escaped, so HTML in questions and answers
is displayed as text; the content security policy stands behind that.
"""

import base64
import html
import io

from PIL import Image

from dataset.records import Photo
from errors import UserError
from visual.transform import load_image

THUMBNAIL = 480  # pixels of the longer edge
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f8fafc; --ink: #111827; --grey: #6b7280; --rule: #e5e7eb;
  --right: #15803d; --wrong: #b91c1c; --mark: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --paper: #111827; --card: #1f2937; --ink: #f3f4f6; --grey: #9ca3af;
  --rule: #374151; --right: #4ade80; --wrong: #f87171; --mark: #60a5fa; } }
body { margin: 0 auto; padding: 16px; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
.note, th, summary, .kind { color: var(--grey); font-size: .875rem; font-weight: normal; }
.cards { display: grid; gap: 16px; align-items: start;
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


def whole_page(title: str, body: str, style: str = "") -> str:
    """Return the page; `body` is HTML, `style` is CSS after the common rules."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str, style: str = "") -> str:
    """A text as HTML; `style` is its CSS class."""
    return f'<p class="text {style}" dir="auto">{html.escape(text)}</p>'


def read_thumbnail(photo: Photo, edge: int = THUMBNAIL) -> str:
    """Return a photo as a small JPEG in a data URI, or the error message if it cannot be read."""
    try:
        image = load_image(photo.picture)
    except (UserError, OSError) as error:
        return str(error)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def show_thumbnails(pictures: list[str]) -> str:
    """Results of `read_thumbnail` as HTML."""
    return "".join(
        f'<img src="{html.escape(text)}" alt="photo">' if text.startswith("data:") else paragraph(text, "failed")
        for text in pictures
    )
