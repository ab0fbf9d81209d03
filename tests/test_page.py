"""The chat of the page, driven in a headless Chromium with an engine that tells what it was sent."""

import json
import re
import socket
import threading
import zipfile

from cli import run_script

import pytest
from PIL import Image

import test_gui
from answering.question_file import answer_file
from config import Generate, Gui
from evaluation import screenshots
from page.asking import Shared
from page.checkpoints import Engines
from page.texts import TEXTS
from tests.page.driver import (
    PATIENCE,
    THUMBNAILS,
    SpokenEngine,
    ask,
    expect,
    expect_text,
    fresh,
    no_browser,
    opened,
    served,
    upload,
    wait_until,
)
from tests.telling import free_port

pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(no_browser(), reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),  # Gradio uses what pandas 3 calls old
]
EXAMPLE = TEXTS["example_2"][0]
FIGURES = "first token after 0.25 s · 8.5 tokens/s · tokens: 19 read, 11 reused"


@pytest.fixture(scope="module")
def engine():
    return SpokenEngine()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(engine, uploads):
    engines, samples = Engines(engine, "checkpoint-7"), test_gui.sample_photos()
    with served(uploads, engines, Generate(max_new_tokens=50), samples, max_upload_mb=1) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with screenshots.running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def one_page(browser, address):
    with opened(browser, address) as page:
        yield page


@pytest.fixture
def page(one_page):
    fresh(one_page)
    return one_page


@pytest.fixture
def photos(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    Image.new("RGB", (33, 22), "blue").save(tmp_path / "蓝色 blue.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "蓝色 blue.jpg").read_bytes()[:300])
    (tmp_path / "not.png").write_text("text")
    (tmp_path / "large.png").write_bytes(bytes(2_000_000))
    return tmp_path


def test_asked_and_answered_with_history_and_kept_photo(page, photos, engine):
    upload(page, photos / "red.png")
    ask(page, "What is it?")
    expect_text(page, "#chat", "(64, 48) What is it?")
    expect_text(page, "#status", FIGURES)
    page.fill("#question textarea", "还有呢？")
    page.keyboard.press("Enter")
    expect_text(page, "#chat", "(64, 48) What is it? + 还有呢？")
    expect(page, "#question textarea").to_have_value("")
    assert engine.settings.max_new_tokens == 50

    expect(page, "#again").to_be_enabled()
    page.click("#again")
    expect_text(page, "body", "Greedy answers stay the same")
    expect(page, "#again").to_be_enabled()
    expect_text(page, "#chat", "(64, 48) What is it? + 还有呢？")
    expect(page, "#chat .message.bot").to_have_count(2)
    wait_until(lambda: engine.settings.seed != Generate().seed)  # the page looks as before until it is asked again

    page.click("#clear")
    expect(page, "#chat").not_to_contain_text("What is it?")
    ask(page, "Fresh?")
    expect_text(page, "#status", "No photo yet")


def test_an_edited_question_is_asked_anew_and_what_came_after_it_is_gone(page, photos):
    page.click("#edit")
    expect_text(page, "#status", "no answer to repeat")
    upload(page, photos / "red.png")
    for number, question in enumerate(("first", "second", "third"), start=1):
        ask(page, question)
        expect(page, "#chat .message.bot").to_have_count(number)
        expect(page, "#ask").to_be_enabled()
    page.click("#edit")
    expect(page, "#question textarea").to_have_value("third")
    page.click("#editing input")
    page.get_by_role("option", name="2: second").click()
    expect(page, "#question textarea").to_have_value("second")
    ask(page, "<b>other</b>")
    expect_text(page, "#chat", "(64, 48) first + <b>other</b>")
    expect(page, "#chat .message.bot").to_have_count(2)
    expect(page, "#chat").not_to_contain_text("third")
    expect(page, "#editing").to_be_hidden()
    expect(page, "#ask").to_be_enabled()

    page.click("#edit")
    page.click("#editing input")
    page.get_by_role("option", name="1: first").click()
    expect(page, THUMBNAILS).to_have_count(1)  # its photo, which may be exchanged
    page.locator("#question button[aria-label='Remove file']").click()
    upload(page, photos / "蓝色 blue.jpg")
    expect(page, "#where").to_be_hidden()
    ask(page, "begin")
    expect_text(page, "#chat", "(33, 22) begin")
    expect(page, "#chat .message.bot").to_have_count(1)
    expect(page, "#ask").to_be_enabled()

    page.click("#edit")
    expect(page, "#question textarea").to_have_value("begin")
    page.click("#editing input")
    page.get_by_role("option", name="none: ask a new question").click()
    expect(page, "#question textarea").to_have_value("")
    expect(page, "#editing").to_be_hidden()  # comes with the empty box; what is typed before it may be lost
    ask(page, "next")
    expect_text(page, "#chat", "(33, 22) begin + next")


def test_photos_stand_beside_their_messages(page, photos):
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    ask(page, "first")
    expect_text(page, "#chat", "(64, 48) (33, 22) first")
    expect(page, THUMBNAILS).to_have_count(0)
    upload(page, photos / "蓝色 blue.jpg")
    ask(page, "second")
    expect_text(page, "#chat", "(64, 48) (33, 22) first + (33, 22) second")
    ask(page, "third")
    expect_text(page, "#chat", "(64, 48) (33, 22) first + (33, 22) second + third")
    asked = page.locator("#chat .user-row")
    assert [asked.nth(number).locator("img").count() for number in range(3)] == [2, 1, 0]
    for number in range(3):  # the browser shows them
        picture = f"#chat .user-row img >> nth={number}"
        expect(page, picture).to_have_js_property("naturalWidth", [64, 33, 33][number])
    first, second = (page.locator("#chat .user-row img").nth(number).bounding_box() for number in (0, 1))
    assert first["y"] < second["y"] + second["height"]
    assert second["y"] < first["y"] + first["height"]  # side by side
    assert page.locator("#chat .user-row button:has(img)").first.get_attribute("aria-label") == "Photo"
    expect(page, "#chat button[aria-label='Share']:visible").to_have_count(0)  # it would send them to a website


def test_retry_sends_the_photos_of_the_question_again(page, photos):
    upload(page, photos / "red.png", photos / "red.png")
    ask(page, "twice")
    expect_text(page, "#chat", "(64, 48) (64, 48) twice")
    upload(page, photos / "蓝色 blue.jpg")  # waits for the next question
    page.click("#again")
    expect_text(page, "#status", FIGURES)
    expect(page, "#ask").to_be_enabled()
    expect_text(page, "#chat", "(64, 48) (64, 48) twice")
    expect(page, "#chat .user-row").to_have_count(1)
    ask(page, "next")
    expect_text(page, "#chat", "(64, 48) (64, 48) twice + (33, 22) next")


def test_a_new_photo_in_a_chat_asks_where_it_belongs(page, photos):
    upload(page, photos / "red.png")
    expect(page, "#where").to_be_hidden()
    ask(page, "first")
    expect_text(page, "#chat", "(64, 48) first")
    upload(page, photos / "蓝色 blue.jpg")
    expect(page, "#where").to_be_visible()
    page.get_by_label("Ask about the new one in a new chat").check()
    ask(page, "second")
    expect_text(page, "#chat", "(33, 22) second")
    expect(page, "#chat").not_to_contain_text("first")
    expect(page, "#where").to_be_hidden()


def test_a_photo_taken_away_before_asking_is_not_sent(page, photos):
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    page.locator("#question button[aria-label='Remove file']").first.click()
    expect(page, THUMBNAILS).to_have_count(1)
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
    expect_text(page, "#chat", "is gone: start a new chat and add it again")
    expect(page, "#question textarea").to_have_value("second")
    expect(page, THUMBNAILS).to_have_count(1)
    page.click("#clear")
    expect(page, "#chat").not_to_contain_text("is gone")
    page.click("#ask")
    expect_text(page, "#chat", "(33, 22) second")


def test_an_example_leaves_the_photos_in_the_box_and_a_sample_joins_them(page, photos):
    upload(page, photos / "red.png")
    ask(page, "first")
    expect_text(page, "#status", FIGURES)
    fresh(page)
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    page.get_by_role("button", name=EXAMPLE).click()
    expect(page, "#question textarea").to_have_value(EXAMPLE)
    page.locator("#samples button").first.click()
    expect(page, THUMBNAILS).to_have_count(3)
    expect(page, "#question textarea").to_have_value(EXAMPLE)
    page.click("#ask")
    expect_text(page, "#chat", f"(64, 48) (33, 22) (384, 384) {EXAMPLE}")


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
    expect(page, THUMBNAILS).to_have_count(1)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_photo_is_pasted_or_dropped(page, way):
    page.evaluate("""async way => {
        const canvas = new OffscreenCanvas(64, 48)
        canvas.getContext('2d').fillRect(0, 0, 9, 9)
        const blob = await canvas.convertToBlob({type: 'image/png'}), data = new DataTransfer()
        data.items.add(new File([blob], 'image.png', {type: 'image/png'}))
        const options = {clipboardData: data, dataTransfer: data, bubbles: true, cancelable: true}
        const event = way === 'paste' ? new ClipboardEvent('paste', options) : new DragEvent('drop', options)
        document.querySelector('#question textarea').dispatchEvent(event)
    }""", way)  # fmt: skip
    expect(page, THUMBNAILS).to_have_count(1)
    ask(page, "What?")
    expect_text(page, "#chat", "(64, 48) What?")


def test_many_photos_are_cancelled_after_the_questions_at_work(page, photos, engine, monkeypatch):
    """A file of questions: its progress is shown, and what was answered before Cancel stays."""
    rows = [{"image": "red.png", "question": f"{number}?" if number < 16 else "wait"} for number in range(40)]
    (photos / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stop, told = Shared.stop, threading.Event()
    monkeypatch.setattr(Shared, "stop", lambda shared, session: (stop(shared, session), told.set()))
    engine.go_on.clear()
    page.get_by_role("tab", name="Many photos").click()
    page.set_input_files("#batch-files input[type=file]", [str(photos / "red.png"), str(photos / "rows.jsonl")])
    try:
        expect(page, "#batch-files .file-preview tr.file").to_have_count(2)
        page.click("#batch-run")
        expect_text(page, "#batch-state", "16 of 40 answered")
        page.click("#batch-cancel")
        assert told.wait(PATIENCE / 1000)
        engine.go_on.set()
        expect_text(page, "#batch-state", "32 of 40 answered · Stopped.")
        with page.expect_download() as download:
            page.click("#batch-jsonl")
    finally:
        engine.go_on.set()
        page.get_by_role("tab", name="Chat").click()  # where the other tests are
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == [f"1 {row['question']}" for row in rows[:32]]


def test_an_answer_is_copied_while_another_person_waits(browser, address, page, photos, engine):
    engine.go_on.clear()
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as first:
        upload(first, photos / "red.png")
        ask(first, "wait")
        expect(first, "#stop").to_be_enabled()
        upload(page, photos / "red.png")
        ask(page, "second")
        expect_text(page, "#status", "1 before you")
        engine.go_on.set()
        expect_text(page, "#chat", "(64, 48) second")
        expect(page, "#status").not_to_contain_text("before you")
        expect(first, "#ask").to_be_enabled()
        first.hover("#chat .message.bot")
        first.click("#chat [title='Copy message']")
        first.wait_for_function("navigator.clipboard.readText().then(text => text.trim() === '(64, 48) wait')")


@pytest.mark.nightly  # `test_safe.py` has the same without a browser
def test_a_password_opens_the_page(browser, tmp_path):
    with served(tmp_path / "uploads", user="me", password="secret") as address:
        page = browser.new_page()
        page.goto(address)
        for password in ("wrong", "secret"):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                expect_text(page, "body", "Incorrect Credentials")
        page.wait_for_selector("#ask")
        page.close()


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
    expect(page, "#question textarea").to_have_value("What?")
    expect(page, THUMBNAILS).to_have_count(2)
    page.click("#ask")
    expect_text(page, "#chat", "(64, 48) (33, 22) What?")
    expect(page, "#chat").not_to_contain_text("⚠")


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
    expect(page, "#chat .message img").to_have_count(1)  # the photo
    ask(page, "and now?")
    expect_text(page, "#chat", f"{text} + and now?")


def test_errors_stand_in_the_chat_and_the_question_comes_back(page, photos):
    upload(page, photos / "red.png")
    ask(page, "memory")
    expect_text(page, "#chat", "Out of memory: lower")
    expect(page, "#question textarea").to_have_value("memory")
    expect(page, THUMBNAILS).to_have_count(1)
    ask(page, "long")
    expect_text(page, "#chat", "the dialogue is <b>too long</b>")
    ask(page, "defect")
    expect_text(page, "#chat", "KeyError: 'something of ours'")
    expect(page, "#ask").to_be_enabled()
    ask(page, "first")
    expect_text(page, "#chat", "(64, 48) first")
    ask(page, "second")
    expect_text(page, "#chat", "(64, 48) first + second")
    expect(page, "#ask").to_be_enabled()
    page.click("#edit")
    page.click("#editing input")
    page.get_by_role("option", name="1: first").click()
    expect(page, "#question textarea").to_have_value("first")
    page.fill("#question textarea", "long")
    page.wait_for_timeout(500)
    expect(page, "#question textarea").to_have_value("long")  # nothing came over what was typed
    page.click("#ask")
    expect_text(page, "#chat", "⚠ the dialogue")
    expect_text(page, "#chat", "(64, 48) first + second")  # the chat is as before
    expect(page, "#ask").to_be_enabled()
    page.click("#clear")
    expect(page, "#chat .message").to_have_count(0)
    ask(page, "short")  # failed questions are not part of what the model is sent
    expect_text(page, "#chat", "(64, 48) short")


def test_after_a_defect_of_the_page_one_can_ask_again(page, photos, monkeypatch):
    def broken(*_):
        raise KeyError("a defect of the page")

    upload(page, photos / "red.png")
    with monkeypatch.context() as patch:
        patch.setattr("page.chat_tab.to_keep", broken)
        ask(page, "first")
        expect_text(page, "#chat", "(64, 48) first")
        expect(page, "#ask").to_be_enabled()
    upload(page, photos / "red.png")
    ask(page, "second")
    expect_text(page, "#chat", "(64, 48) second")


def test_the_box_is_empty_after_answers_that_come_at_once(page, photos):
    """The browser may apply the updates of a quick answer together; then every third question stayed in the box."""
    for number in range(8):
        upload(page, photos / "red.png")
        ask(page, f"word{number}")
        expect_text(page, "#chat", f"word{number}")
        expect(page, "#ask").to_be_enabled()
        expect(page, "#question textarea").to_have_value("")
        expect(page, THUMBNAILS).to_have_count(0)


def test_stop_keeps_what_was_said_and_ends_the_work(page, photos, engine):
    upload(page, photos / "red.png")
    engine.closed_early = False
    ask(page, "slow")
    expect_text(page, "#chat", "slow on on on")
    expect(page, "#ask").to_be_disabled()
    page.click("#stop")
    expect_text(page, "#status", f"Stopped. {FIGURES}")
    expect(page, "#ask").to_be_enabled()
    assert engine.closed_early
    ask(page, "next")
    expect_text(page, "#chat", "slow + next")


def test_stop_before_the_first_word_gives_the_question_back(page, photos):
    upload(page, photos / "red.png")
    ask(page, "silent")
    expect_text(page, "#status", "Looking at the photo")
    page.click("#stop")
    expect_text(page, "#status", "Stopped")
    expect(page, "#question textarea").to_have_value("silent")
    expect(page, THUMBNAILS).to_have_count(1)
    page.click("#again")
    expect_text(page, "#status", "no answer to repeat")
    ask(page, "next")
    expect_text(page, "#chat", "(64, 48) next")


def test_settings_reach_the_engine(page, photos, engine):
    page.click("#settings > button")
    temperature = page.locator("#temperature input[type=number]")
    expect(page, "#temperature input[type=number]").to_be_disabled()  # greedy
    page.locator("#greedy input").uncheck()
    expect(page, "#temperature input[type=number]").to_be_enabled()
    temperature.fill("0.5")
    for name, value in {"top_p": "0.9", "top_k": "40", "min_p": "0.1", "repetition_penalty": "1.2"}.items():
        page.locator(f"#{name} input[type=number]").fill(value)
    page.locator("#seed input").fill("5")
    page.locator("#longest input[type=number]").fill("7")
    page.fill("#system textarea", "Answer in one word.")
    page.locator("#system textarea").blur()
    upload(page, photos / "red.png")
    ask(page, "What?")
    expect_text(page, "#chat", "(64, 48) What?")
    assert engine.settings == Generate(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, seed=5
    )
    assert engine.messages[0] == {"role": "system", "content": "Answer in one word."}
    page.fill("#system textarea", "")
    page.locator("#greedy input").check()
    page.locator("#longest input[type=number]").fill("50")
    page.click("#settings > button")


def test_a_chat_comes_back_from_the_browsers_storage(page, photos):
    page.click("#kept > button")
    page.click("#forget-all")
    upload(page, photos / "red.png")
    ask(page, "kept <b>one</b>")
    expect_text(page, "#chat", "(64, 48) kept")
    expect_text(page, "#status", FIGURES)
    page.click("#clear")
    expect(page, "#chat .message").to_have_count(0)
    page.click("#kept-list input")
    page.get_by_role("option", name="kept <b>one</b>").click()
    expect_text(page, "#chat", "(64, 48) kept <b>one</b>")
    expect(page, "#chat .user-row img").to_have_count(1)
    page.evaluate("""() => new MutationObserver(() => {
        if (document.querySelector('#status').textContent.includes('tokens: ')) location.reload()
    }).observe(document.querySelector('#status'), {childList: true, subtree: true})""")
    with page.expect_event("load"):  # as soon as the answer is there; the same tab shows its chat again
        ask(page, "more")
    page.wait_for_selector("#ask")
    expect_text(page, "#chat", "+ more")
    page.wait_for_function("JSON.parse(localStorage.getItem('vqa-chats')).length === 1")
    page.click("#kept > button")
    page.click("#forget-all")
    page.wait_for_function("JSON.parse(localStorage.getItem('vqa-chats')).length === 0")


def test_a_browser_without_storage_keeps_nothing_and_goes_on(page):
    kept = """() => {
        const storages = ['localStorage', 'sessionStorage']
        const closed = {configurable: true, get() { throw new DOMException('closed') }}
        const open = storages.map(name => Object.getOwnPropertyDescriptor(window, name))
        storages.forEach(name => Object.defineProperty(window, name, closed))
        try {
            return [vqa.keep({id: 'x', title: 'x', messages: [1]}).choices, vqa.open('x'), vqa.current('x')]
        } finally {
            storages.forEach((name, number) => Object.defineProperty(window, name, open[number]))
        }
    }"""
    assert page.evaluate(kept) == [[], None, None]


def test_a_downloaded_chat_can_be_read_and_asked_by_the_command_line(page, photos, tmp_path):
    page.click("#download")
    expect_text(page, "#status", "nothing to download")
    upload(page, photos / "red.png", photos / "蓝色 blue.jpg")
    for number, question in enumerate(("first", "second"), start=1):
        ask(page, question)
        expect(page, "#chat .message.bot").to_have_count(number)
        expect(page, "#ask").to_be_enabled()
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path / "chat")
    text = (tmp_path / "chat/chat.md").read_text(encoding="utf-8")
    assert "> second" in text
    for file in re.findall(r"!\[\]\((.+)\)", text):
        Image.open(tmp_path / "chat" / file).verify()
    answered, failed = answer_file(SpokenEngine(), tmp_path / "chat/chat.jsonl", tmp_path / "answers.jsonl")
    assert (answered, failed) == (1, 0)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"].endswith("second")


def test_empty_answer_is_shown_as_such(page, photos):
    upload(page, photos / "red.png")
    ask(page, "nothing")
    expect_text(page, "#chat", "(no answer)")
    expect_text(page, "#status", "0 written")


@pytest.mark.nightly
def test_screenshots_of_a_real_checkpoint(tmp_path, photos, browser, tiny_checkpoint):
    """`test_gui.py` and the command that photographs it, in processes of their own, on random weights."""
    model_root = tiny_checkpoint.parent.parent
    with screenshots.running_page(
        tiny_checkpoint, [f"model_root={model_root}", "generate.max_new_tokens=8"]
    ) as address:
        screenshots.take_screenshots(
            browser, address, [photos / "red.png", photos / "蓝色 blue.jpg"], ["一？", "Two?"], tmp_path / "docs"
        )
    for name, shot in screenshots.SHOTS.items():
        with Image.open(tmp_path / "docs" / name) as picture:
            assert picture.width == shot.width
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_taken_port_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}.*gui.port={port + 1}"):
            test_gui.check_port(Gui(port=port))
    test_gui.check_port(Gui(port=free_port()))


def test_the_script_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"\Aerror: .*none.*\Z"):  # tests/test_predict.py does it in another process
        run_script(lambda: test_gui.main(["--checkpoint", str(tmp_path / "none")]))
