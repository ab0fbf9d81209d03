"""The page, driven in a headless Chromium with an answerer that tells what it was sent."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import test_gui
from config import Generate, Gui
from evaluation import screenshots

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, screenshots.BROWSERS)), reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),  # Gradio uses what pandas 3 calls old
]


THUMBNAILS = "#question .thumbnail-wrapper"


class TellingAnswerer:
    """Answers with the questions it was sent; some questions make it fail or slow."""

    def __init__(self):
        self.settings = None  # of the last question
        self.closed_early = False

    def stream(self, image, messages, settings):
        self.settings = settings
        assert image is None
        question = messages[-1]["content"]
        if question == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if question == "long":
            raise ValueError("the dialogue is <b>too long</b>: start a new one")
        if question == "silent":
            time.sleep(3)
        if question == "defect":
            raise KeyError("something of ours")
        try:
            asked = messages[::2]
            yield " + ".join(" ".join([*(str(p.size) for p in m["images"]), m["content"]]) for m in asked)
            if question == "slow":
                for _ in range(400):
                    time.sleep(0.05)
                    yield " on"
        except GeneratorExit:
            self.closed_early = True
            raise


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def answerer():
    return TellingAnswerer()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(answerer, uploads):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(uploads))
    patch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there: the page must not need a proxy
    patch.delenv("no_proxy", raising=False)
    patch.delenv("NO_PROXY", raising=False)
    gui = Gui(port=free_port(), max_upload_mb=1)
    page = test_gui.build_page(answerer, Generate(max_new_tokens=50), "checkpoint-7")
    test_gui.launch(page, gui)
    yield f"http://{gui.host}:{gui.port}/"
    page.close()
    patch.undo()


@pytest.fixture(scope="module")
def browser():
    with screenshots.running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """An open page; afterwards it must have asked nobody but its own server, and run no script of a text."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(20_000)
    requests, dialogs = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    assert len(requests) > 5
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert dialogs == []


@pytest.fixture
def photos(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    Image.new("RGB", (33, 22), "blue").save(tmp_path / "蓝色 blue.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "蓝色 blue.jpg").read_bytes()[:300])
    (tmp_path / "not.png").write_text("text")
    (tmp_path / "large.png").write_bytes(bytes(2_000_000))
    return tmp_path


def upload(page, *files):
    """Attach files to the question, as a user does; wait for their pictures."""
    before = page.locator(THUMBNAILS).count()
    with page.expect_file_chooser() as chooser:  # without it, a file that was chosen before would not be seen again
        page.click("#question .upload-button")
    chooser.value.set_files([str(file) for file in files])
    # uploads share the machine with other tests
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(before + len(files), timeout=30_000)


def ask(page, question):
    page.fill("#question textarea", question)
    page.click("#ask")


def expect_text(page, selector, text):
    sync_api.expect(page.locator(selector)).to_contain_text(text)


def test_asked_and_answered_with_history_and_kept_photo(page, photos, answerer):
    upload(page, photos / "red.png")
    ask(page, "What is it?")
    expect_text(page, "#chat", "(64, 48) What is it?")
    expect_text(page, "#status", "characters")
    page.fill("#question textarea", "还有呢？")
    page.keyboard.press("Enter")
    expect_text(page, "#chat", "(64, 48) What is it? + 还有呢？")
    assert page.input_value("#question textarea") == ""
    assert answerer.settings.max_new_tokens == 50

    page.click("#again")
    time.sleep(0.5)
    expect_text(page, "#chat", "(64, 48) What is it? + 还有呢？")
    sync_api.expect(page.locator("#chat .message.bot")).to_have_count(2)
    assert answerer.settings.seed != Generate().seed

    page.click("#clear")
    sync_api.expect(page.locator("#chat")).not_to_contain_text("What is it?")
    ask(page, "Fresh?")
    expect_text(page, "#status", "No photo yet")


def test_photos_stand_beside_their_messages(page, photos):
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    ask(page, "first")
    expect_text(page, "#chat", "(64, 48) (33, 22) first")
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(0)
    upload(page, photos / "蓝色 blue.jpg")
    ask(page, "second")
    expect_text(page, "#chat", "(64, 48) (33, 22) first + (33, 22) second")
    ask(page, "third")
    expect_text(page, "#chat", "(64, 48) (33, 22) first + (33, 22) second + third")
    asked = page.locator("#chat .user-row")
    assert [asked.nth(number).locator("img").count() for number in range(3)] == [2, 1, 0]
    for number in range(3):  # the browser shows them
        picture = page.locator("#chat .user-row img").nth(number)
        sync_api.expect(picture).to_have_js_property("naturalWidth", [64, 33, 33][number])
    first, second = (page.locator("#chat .user-row img").nth(number).bounding_box() for number in (0, 1))
    assert first["y"] < second["y"] + second["height"]
    assert second["y"] < first["y"] + first["height"]  # side by side

    page.click("#again")
    expect_text(page, "#status", "characters")
    sync_api.expect(page.locator("#ask")).to_be_enabled()
    expect_text(page, "#chat", "(64, 48) (33, 22) first + (33, 22) second + third")
    sync_api.expect(page.locator("#chat .user-row img")).to_have_count(3)


def test_retry_sends_the_photos_of_the_question_again(page, photos):
    upload(page, photos / "red.png", photos / "red.png")
    ask(page, "twice")
    expect_text(page, "#chat", "(64, 48) (64, 48) twice")
    upload(page, photos / "蓝色 blue.jpg")  # waits for the next question
    page.click("#again")
    expect_text(page, "#status", "characters")
    sync_api.expect(page.locator("#ask")).to_be_enabled()
    expect_text(page, "#chat", "(64, 48) (64, 48) twice")
    sync_api.expect(page.locator("#chat .user-row")).to_have_count(1)
    ask(page, "next")
    expect_text(page, "#chat", "(64, 48) (64, 48) twice + (33, 22) next")


def test_a_photo_taken_away_before_asking_is_not_sent(page, photos):
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    page.locator("#question button[aria-label='Remove file']").first.click()
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(1)
    ask(page, "What?")
    expect_text(page, "#chat", "(33, 22) What?")


def test_a_photo_added_while_an_answer_grows_waits_for_the_next_question(page, photos):
    upload(page, photos / "red.png")
    ask(page, "slow")
    expect_text(page, "#chat", "slow on on on")
    upload(page, photos / "蓝色 blue.jpg")
    page.click("#stop")
    expect_text(page, "#status", "Stopped")
    ask(page, "now")
    expect_text(page, "#chat", "(64, 48) slow + (33, 22) now")


def test_a_photo_that_is_gone_is_said(page, photos, uploads):
    upload(page, photos / "red.png")
    ask(page, "first")
    expect_text(page, "#chat", "(64, 48) first")
    for file in uploads.rglob("red.png"):
        file.unlink()
    upload(page, photos / "蓝色 blue.jpg")
    ask(page, "second")
    expect_text(page, "#chat", "is gone: press Clear and add it again")
    sync_api.expect(page.locator("#question textarea")).to_have_value("second")
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(1)
    page.click("#clear")
    sync_api.expect(page.locator("#chat")).not_to_contain_text("is gone")
    page.click("#ask")
    expect_text(page, "#chat", "(33, 22) second")


def test_an_example_leaves_the_photos_in_the_box(page, photos):
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    page.get_by_text(test_gui.EXAMPLES[1]).click()
    sync_api.expect(page.locator("#question textarea")).to_have_value(test_gui.EXAMPLES[1])
    page.click("#ask")
    expect_text(page, "#chat", f"(64, 48) (33, 22) {test_gui.EXAMPLES[1]}")


def test_a_long_pasted_text_stays_text(page, photos):
    upload(page, photos / "red.png")
    page.focus("#question textarea")
    page.evaluate("""text => {
        const data = new DataTransfer(); data.setData('text/plain', text)
        const event = new ClipboardEvent('paste', {clipboardData: data, cancelable: true})
        window.taken = !document.querySelector('#question textarea').dispatchEvent(event)
    }""", "word " * 1000)  # fmt: skip
    page.wait_for_timeout(500)
    assert not page.evaluate("window.taken")  # so the browser puts the text in the box
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(1)


def test_missing_photo_and_empty_question_are_said(page, photos):
    ask(page, "What?")
    expect_text(page, "#status", "No photo yet")
    assert page.input_value("#question textarea") == "What?"
    upload(page, photos / "red.png")
    ask(page, "   ")
    expect_text(page, "#status", "The question is empty")
    page.click("#again")
    expect_text(page, "#status", "no answer to repeat")


@pytest.mark.parametrize(("name", "sentence"), [("broken.jpg", "fetch the photo again"), ("not.png", "not an image")])
def test_broken_photo_is_said_and_taken_away(page, photos, name, sentence):
    upload(page, photos / "red.png", photos / name, photos / "蓝色 blue.jpg")
    ask(page, "What?")
    expect_text(page, "#chat", f"⚠ {name}: ")
    expect_text(page, "#chat", sentence)
    assert "/" not in page.inner_text("#chat")
    sync_api.expect(page.locator("#question textarea")).to_have_value("What?")
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(2)
    page.click("#ask")
    expect_text(page, "#chat", "(64, 48) (33, 22) What?")
    sync_api.expect(page.locator("#chat")).not_to_contain_text("⚠")


def test_too_large_photo_is_refused(page, photos):
    page.set_input_files("#question input[type=file]", str(photos / "large.png"))
    expect_text(page, "body", "exceed the maximum allowed size of 1.0 Mb")
    ask(page, "What?")
    expect_text(page, "#status", "No photo yet")


def test_control_tokens_and_html_are_letters(page, photos):
    upload(page, photos / "red.png")
    text = "<|im_end|> <|extra_0|> <img src=x onerror=alert(1)> <script>alert(2)</script> &lt; **b** $$x$$"
    ask(page, text)
    expect_text(page, "#chat", f"(64, 48) {text}")
    assert page.locator("#chat .message [onerror], #chat .message script, #chat .katex").count() == 0
    sync_api.expect(page.locator("#chat .message img")).to_have_count(1)  # the photo
    ask(page, "and now?")
    expect_text(page, "#chat", f"{text} + and now?")


def test_errors_stand_in_the_chat_and_the_question_comes_back(page, photos):
    upload(page, photos / "red.png")
    ask(page, "memory")
    expect_text(page, "#chat", "Out of memory: lower")
    sync_api.expect(page.locator("#question textarea")).to_have_value("memory")
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(1)
    ask(page, "long")
    expect_text(page, "#chat", "the dialogue is <b>too long</b>")
    ask(page, "defect")
    expect_text(page, "#chat", "KeyError: 'something of ours'")
    sync_api.expect(page.locator("#ask")).to_be_enabled()
    ask(page, "short")  # failed questions are not part of what the model is sent
    expect_text(page, "#chat", "(64, 48) short")


def test_stop_keeps_what_was_said_and_ends_the_work(page, photos, answerer):
    upload(page, photos / "red.png")
    answerer.closed_early = False
    ask(page, "slow")
    expect_text(page, "#chat", "slow on on on")
    sync_api.expect(page.locator("#ask")).to_be_disabled()
    page.click("#stop")
    expect_text(page, "#status", "Stopped")
    sync_api.expect(page.locator("#ask")).to_be_enabled()
    for _ in range(100):
        if answerer.closed_early:
            break
        time.sleep(0.1)
    assert answerer.closed_early
    ask(page, "next")
    expect_text(page, "#chat", "slow + next")


def test_stop_before_the_first_word_gives_the_question_back(page, photos):
    upload(page, photos / "red.png")
    ask(page, "silent")
    expect_text(page, "#status", "Looking at the photo")
    page.click("#stop")
    expect_text(page, "#status", "Stopped")
    assert page.input_value("#question textarea") == "silent"
    sync_api.expect(page.locator(THUMBNAILS)).to_have_count(1)
    page.click("#again")
    expect_text(page, "#status", "no answer to repeat")
    ask(page, "next")
    expect_text(page, "#chat", "(64, 48) next")


def test_phone_width_has_no_sideways_scrolling(page, photos):
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, *[photos / "red.png"] * 12)
    ask(page, "What?")
    expect_text(page, "#status", "characters")
    upload(page, *[photos / "red.png"] * 12)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ["ask", "stop", "again", "clear"]:
        assert page.evaluate(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#{name}'))"), name


def test_empty_answer_is_shown_as_such(page, photos, answerer, monkeypatch):
    monkeypatch.setattr(answerer, "stream", lambda image, messages, settings: (piece for piece in []))
    upload(page, photos / "red.png")
    ask(page, "What?")
    expect_text(page, "#chat", "(no answer")
    expect_text(page, "#status", "0 characters")


def test_screenshots_of_a_real_checkpoint(tmp_path, photos, browser, tiny_checkpoint):
    """`test_gui.py` and the command that photographs it, in processes of their own, on random weights."""
    model_root = tiny_checkpoint.parent.parent
    with screenshots.running_page(
        tiny_checkpoint, [f"model_root={model_root}", "generate.max_new_tokens=8"]
    ) as address:
        screenshots.take_screenshots(
            browser, address, [photos / "red.png", photos / "蓝色 blue.jpg"], ["一？", "Two?"], tmp_path / "docs"
        )
    for name, (width, _) in screenshots.SIZES.items():
        with Image.open(tmp_path / "docs" / name) as picture:
            assert picture.width == width
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_taken_port_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}.*gui.port={port + 1}"):
            test_gui.check_port(Gui(port=port))
    test_gui.check_port(Gui(port=free_port()))


def test_script_ends_with_one_line_and_status_1(tmp_path):
    script = [sys.executable, str(Path(test_gui.__file__)), "--checkpoint", str(tmp_path / "none")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
