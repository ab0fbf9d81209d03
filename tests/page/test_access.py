"""Who can use the page: both languages, phone, dark mode, keyboard, screen reader; in Chromium."""

import pytest
from PIL import Image

import test_gui
from config import Generate
from evaluation import screenshots
from page.checkpoints import Engines
from tests.page.driver import (
    THUMBNAILS,
    SpokenEngine,
    ask,
    expect,
    expect_text,
    no_browser,
    opened,
    proxied,
    served,
    upload,
)
from tests.page.test_pieces import CHINESE

pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(no_browser(), reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),  # Gradio uses what pandas 3 calls old
]
PANELS = ("part-panel", "looking", "beside", "kept", "settings", "camera")
SERIOUS = ("serious", "critical")
# what is shown, and what a screen reader says
WORDS = """() => [document.body.innerText,
    ...[...document.querySelectorAll('[aria-label], [title], [placeholder], [alt]')]
    .filter(element => element.checkVisibility())
    .flatMap(element => ['aria-label', 'title', 'placeholder', 'alt'].map(name => element.getAttribute(name) || ''))
].join('\\n')"""

# what has the focus, and whether the browser draws a line around it
FOCUS = """() => {
    const element = document.activeElement
    return [element.closest('[id]')?.id, getComputedStyle(element).outlineStyle !== 'none']
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "c7"  # the page shows the panels of a model that is here
    engines = Engines(SpokenEngine(), "c7", folder)
    with served(tmp_path_factory.mktemp("uploads"), engines, samples=test_gui.sample_photos()) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with pytest.MonkeyPatch.context() as patch:
        # a camera that films a moving pattern, so that nothing is asked of this machine's
        patch.setattr(screenshots, "FLAGS", [*screenshots.FLAGS, "--use-fake-device-for-media-stream"])
        with screenshots.running_browser() as browser:
            yield browser


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "1.png")
    return tmp_path / "1.png"


def open_panels(page):
    for panel in PANELS:
        page.click(f"#{panel} > button")


def words(page):
    text = page.evaluate(WORDS)
    for name in ("c7", "1.png", "Top-k", "Top-p", "Min-p", "English", "中文", "(64, 48)"):
        text = text.replace(name, "")
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_speaks_one_language(browser, address, photo, language):
    with opened(browser, address, language) as page:
        open_panels(page)
        upload(page, photo)
        ask(page, "1")
        expect(page, "#chat .message.bot").to_have_count(1)
        expect(page, "#ask").to_be_enabled()
        page.click("#again")
        expect(page, "#ask").to_be_enabled()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[language]
        if language == "en":
            assert [line for line in words(page) if CHINESE.search(line)] == []
        else:
            latin = [line for line in words(page) if line.isascii() and sum(map(str.isalpha, line)) > 3]
            assert latin == []


def test_the_language_is_switched_in_the_page_and_kept(browser, address, photo):
    with opened(browser, address, "fr") as page:
        expect_text(page, "#ask", "Ask")
        upload(page, photo)
        ask(page, "一 one")
        expect_text(page, "#chat", "(64, 48) 一 one")
        page.wait_for_function("localStorage.getItem('vqa-chats')")
        page.click("#language")
        expect_text(page, "#ask", "提问")
        expect_text(page, "#chat", "(64, 48) 一 one")  # the chat came along
        page.reload()
        expect_text(page, "#ask", "提问")
        page.click("#clear")
        expect(page, "#chat .message").to_have_count(0)
        ask(page, "什么？")
        expect_text(page, "#status", "还没有照片")
        page.click("#language")
        expect_text(page, "#ask", "Ask")


@pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=pytest.mark.nightly)])
def test_phone_width_has_no_sideways_scrolling(browser, address, photo, language):
    with opened(browser, address, language, width=390, has_touch=True) as page:
        upload(page, *[photo] * 12)
        ask(page, "What?")
        expect(page, "#chat .message.bot").to_have_count(1)
        upload(page, *[photo] * 12)
        open_panels(page)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("ask", "stop", "again", "clear", "download", "language"):
            assert page.evaluate(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#{name}'))"), name


def test_a_phone_with_its_keyboard_up(browser, address, photo):
    """The keyboard leaves 390 × 400: question box and Ask must fit in there together."""
    with opened(browser, address, width=390, has_touch=True) as page:
        page.set_viewport_size({"width": 390, "height": 400})
        upload(page, photo)
        page.tap("#question textarea")
        page.fill("#question textarea", "What is in this picture of mine?\nAnd what else?")
        page.locator("#ask").scroll_into_view_if_needed()
        box, button = (page.locator(name).bounding_box() for name in ("#question textarea", "#ask"))
        assert box["y"] >= 0
        assert button["y"] + button["height"] <= 400
        page.tap("#ask")
        expect_text(page, "#chat", "(64, 48)")
        expect(page, "#again").to_be_enabled()
        open_panels(page)
        names = ("again", "edit", "clear", "download", "box :is(input, textarea)", "look", "compare", "system textarea")
        for name in names:
            page.locator(f"#{name}").scroll_into_view_if_needed()
            expect(page, f"#{name}").to_be_in_viewport(ratio=1)
            page.tap(f"#{name}", trial=True)  # nothing lies over it
        page.get_by_role("tab", name="Many photos").tap()
        for name in ("batch-question :is(input, textarea)", "batch-run"):
            page.locator(f"#{name}").scroll_into_view_if_needed()
            expect(page, f"#{name}").to_be_in_viewport(ratio=1)


def test_the_keyboard_alone_is_enough(browser, address):
    """A sample and a question need no mouse; Tab reaches the buttons of the chat and the panels, and each shows it."""
    with opened(browser, address) as page:
        page.locator("#samples button").first.focus()
        page.keyboard.press("Enter")
        expect(page, "#question .thumbnail-wrapper").to_have_count(1)
        page.focus("#question textarea")
        page.keyboard.type("What?")
        page.keyboard.press("Enter")
        expect_text(page, "#chat", "(384, 384) What?")
        expect(page, "#ask").to_be_enabled()
        page.focus("#language")
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            name, seen = page.evaluate(FOCUS)
            reached |= {name} if seen else set()
        panels = {*PANELS, "examples", "samples"}
        assert {"language", "ask", "again", "edit", "clear", "download"} | panels <= reached


def test_the_keyboard_alone_compares_checkpoints_and_asks_about_many_photos(browser, address, photo):
    with opened(browser, address) as page:
        page.locator("#samples button").first.press("Enter")
        expect(page, THUMBNAILS).to_have_count(1)
        page.focus("#question textarea")
        page.keyboard.type("What?\n")
        expect_text(page, "#chat", "(384, 384) What?")
        expect(page, "#ask").to_be_enabled()
        page.locator("#beside > button").press("Enter")
        page.focus("#right-name input")  # the same checkpoint with an untrained projector is chosen
        for key in ("ArrowUp", "Enter"):
            page.keyboard.press(key)
        expect(page, "#right-name input").to_have_value("c7")
        page.locator("#compare").press("Enter")
        page.wait_for_function("document.querySelector('#right-answer textarea').value === '(384, 384) What?'")
        page.get_by_role("tab", name="Many photos").press("Enter")
        with page.expect_file_chooser() as chooser:
            page.locator("#batch-files button").first.press("Enter")
        chooser.value.set_files(str(photo))
        expect(page, "#batch-files .file-preview tr.file").to_have_count(1)
        page.locator("#batch-question :is(input, textarea)").press_sequentially("Colour?")
        page.locator("#batch-run").press("Enter")
        expect_text(page, "#batch-state", "1 of 1 answered")


@pytest.mark.parametrize(
    ("language", "width", "dark"),
    [
        pytest.param("en", 1280, False, id="wide-light"),
        pytest.param("zh", 390, True, id="phone-dark-zh"),
        pytest.param("zh", 1280, True, id="wide-dark-zh", marks=pytest.mark.nightly),
        pytest.param("en", 390, False, id="phone-light", marks=pytest.mark.nightly),
    ],
)
def test_axe_finds_nothing_serious(browser, address, photo, language, width, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with opened(browser, address, language, width, color_scheme="dark" if dark else "light") as page:
        open_panels(page)
        upload(page, photo)
        ask(page, "What?")
        expect(page, "#chat .message.bot").to_have_count(1)
        expect(page, "#ask").to_be_enabled()
        page.wait_for_timeout(500)
        assert serious(axe.Axe(), page) == []
        page.locator("button[role=tab]").last.click()  # many photos
        page.set_input_files("#batch-files input[type=file]", photo)
        page.fill("#batch-question textarea", "What?")
        page.click("#batch-run")
        expect(page, "#batch-run").to_be_enabled()
        expect(page, "#batch-table td").not_to_have_count(0)
        page.wait_for_timeout(500)
        assert serious(axe.Axe(), page) == []


def serious(axe, page):
    return [
        f"{item['id']}: {node['html'][:200]}"
        for item in axe.run(page).response["violations"]
        if item["impact"] in SERIOUS
        for node in item["nodes"]
    ]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_photo_is_taken_with_the_camera(browser, address, width):
    with opened(browser, address, width=width, permissions=["camera"]) as page:
        page.click("#camera > button")
        page.click("#camera [title='grant webcam access'] button")
        page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
        page.click("#camera [aria-label='capture photo']")
        expect(page, THUMBNAILS).to_have_count(1)
        ask(page, "What is this?")
        page.wait_for_function("document.querySelector('#chat .user-row img')?.naturalWidth > 0")
        size = page.evaluate("(i => [i.naturalWidth, i.naturalHeight])(document.querySelector('#chat .user-row img'))")
        expect_text(page, "#chat .message.bot", f"({size[0]}, {size[1]}) What is this?")


@pytest.mark.nightly  # `test_safe.py` has the same without a browser
def test_it_works_at_a_path_of_a_reverse_proxy(browser, tmp_path, photo):
    engines = Engines(SpokenEngine(), "c7")
    with (
        served(tmp_path / "uploads", engines, Generate(), root_path="/vqa") as inside,
        proxied(inside) as outside,
        opened(browser, outside, path="/vqa/") as page,
    ):
        upload(page, photo)
        ask(page, "What?")
        expect_text(page, "#chat", "(64, 48) What?")
        expect(page, "#chat .user-row img").to_have_js_property("naturalWidth", 64)
