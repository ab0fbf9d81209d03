"""The page of an evaluation: escaped, self-contained, and readable in a browser, narrow and wide, dark and light."""

import re
import shutil

import pytest
from PIL import Image

from dataset.records import Entry, Photo, Turn
from evaluation import screenshots
from evaluation.compare import compare, find_other
from evaluation.report_html import draw_curve, render_report
from tests.evaluation.colours import ColourModel

ATTACK = "<script>alert('x')</script>"
RUN = {"checkpoint": "checkpoint-7", "command": f"eval_vqa.py --checkpoint {ATTACK}", "photos": 4}


class LongModel(ColourModel):
    """Answers at length, with HTML in it and in Chinese."""

    def answer_many(self, requests):
        for number, reply in enumerate(super().answer_many(requests)):
            text = [ATTACK + "x" * 300, "很长的回答" * 40, "red", "yes"][number % 4]
            yield type(reply)(text, "length", 1, 1)


@pytest.fixture
def page(run, photos, entries, tmp_path):
    """The text of a page with all that a page can have."""
    Image.new("RGB", (4000, 300), "red").save(tmp_path / "wide.png")
    photos[0] = Photo(0, "wide.png", "wide.png", tmp_path / "wide.png")
    odd = Entry(
        f"source {ATTACK}",
        f"类型 {ATTACK} " + "x" * 200,
        (Turn(f"<|extra_0|>{ATTACK}？", (ATTACK, "黑色"), images=(3,)),),
    )
    run([*entries, odd], LongModel(), folder="other", settings={"checkpoint": f"other {ATTACK}"})
    settings, replies = find_other(tmp_path / "other", "val")
    found = run([*entries, odd], LongModel(), ["blind", "text", "majority"], kinds=["blur", "rotation"])
    alone = run([*entries, odd], ColourModel(), folder="alone")
    compared = compare(settings["checkpoint"], found.questions, alone.answers["trained"], replies)
    return render_report(found, compared, photos, RUN)


def test_every_text_is_escaped(page):
    assert ATTACK not in page
    assert page.count("&lt;script&gt;") > 10
    assert set(re.findall(r"<(\w+)", page)) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr",
        "th", "td", "details", "summary", "figure", "figcaption", "svg", "line", "text", "polygon", "polyline",
        "circle", "article", "img", "span", "dl", "dt", "dd",
    }  # fmt: skip
    assert "http" not in re.sub(r"http-equiv", "", page)


def test_the_first_sentence_says_whether_it_looks(run, entries, photos):
    looking = render_report(run(entries, baselines=["blind"]), None, photos, RUN)
    assert '<p class="verdict looks">It looks at the photo: accuracy is higher by 0.833' in looking
    found = run(entries[:4], baselines=["blind"], folder="no")
    found.gain = found.gain._replace(score=0.0, low=-0.1)
    assert '<p class="verdict ">No sign that it looks at the photo' in render_report(found, None, photos, RUN)
    found.gain = None
    assert '<p class="verdict open">Whether it looks at the photo was not measured' in render_report(
        found, None, photos, RUN
    )


def test_what_was_not_run_has_no_section(run, entries, photos):
    text = render_report(run(entries), None, photos, RUN)
    for absent in ("Hard photos", "Beside", "with another photo</div>", "most frequent answer of each type</summary>"):
        assert absent not in text
    assert "4 right, 0 wrong" in text


def test_an_unreadable_photo_does_not_cost_the_page(run, entries, photos):
    found = run(entries)
    photos[1].path.unlink()
    assert "photo not found" in render_report(found, None, photos, RUN)


def test_a_curve_starts_at_zero_and_ends_at_the_top():
    points = [type("Point", (), {"score": score, "low": 0.0, "high": 0.5}) for score in (0.5, 0.25, 0.0)]
    drawn = draw_curve(points, floor=0.25, top=0.5, measure="accuracy")
    line = re.search(r'<polyline class="line" points="([^"]+)"', drawn)[1]
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights == [12.0, 69.0, 126.0]  # the top margin, the middle, and 24 above the lower edge
    assert re.search(r'class="floor"[^>]+y1="69.0"', drawn)


@pytest.mark.skipif(not any(map(shutil.which, screenshots.BROWSERS)), reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_page_in_a_browser(page, tmp_path, width, scheme):
    pytest.importorskip("playwright.sync_api")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    with screenshots.running_browser() as browser:
        tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        requests, problems = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto((tmp_path / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.images[0].naturalWidth") == 320
        assert tab.locator("img").first.is_visible()
        assert tab.locator(".verdict").bounding_box()["y"] < 200
        assert ATTACK in tab.locator("article").filter(has_text="alert").first.inner_text()
        assert tab.locator("svg").count() == 2
        for summary in tab.locator("summary").all():
            summary.click()
        assert tab.locator("details[open] table").count() == 2
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"dark": "rgb(17, 24, 39)", "light": "rgb(255, 255, 255)"}[scheme]
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
