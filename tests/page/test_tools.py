"""The page with a model: where it looked, a part of a photo, checkpoints, side by side, many photos; in Chromium."""

import csv
import json
import shutil

import pytest
from PIL import Image

from answering.answer import Answerer
from config import Generate
from evaluation import screenshots
from model.checkpoint import load_checkpoint
from page.checkpoints import UNTRAINED, Engines
from tests.page.driver import ask, expect, expect_text, fresh, no_browser, opened, served, upload

pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(no_browser(), reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),  # Gradio uses what pandas 3 calls old
]


@pytest.fixture(scope="module")
def engines(tiny_checkpoint, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for name in ("checkpoint-2", "checkpoint-10"):
        shutil.copytree(tiny_checkpoint, run / name)
    overrides = {"model_root": str(tiny_checkpoint.parent.parent)}
    model = load_checkpoint(run / "checkpoint-2", overrides=overrides)
    return Engines(Answerer(model), "checkpoint-2", run / "checkpoint-2", overrides)


@pytest.fixture(scope="module")
def address(engines, tmp_path_factory):
    with served(tmp_path_factory.mktemp("uploads"), engines, Generate(max_new_tokens=8)) as address:
        yield address


@pytest.fixture(scope="module")
def one_page(address):
    with screenshots.running_browser() as browser, opened(browser, address) as page:
        for panel in ("looking", "part-panel", "beside", "settings"):
            page.click(f"#{panel} > button")
        yield page


@pytest.fixture
def page(one_page):
    fresh(one_page)
    return one_page


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((200, 100)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def asked(page, photo, question="What is it?"):
    upload(page, photo)
    ask(page, question)
    expect_text(page, "#status", "GiB in use")
    expect(page, "#ask").to_be_enabled()


def test_a_word_of_the_answer_shows_where_it_looked(page, photo):
    page.click("#look")
    expect_text(page, "#looking-state", "There is no answer yet")
    asked(page, photo)
    page.click("#look")
    expect(page, "#map img").to_have_js_property("naturalWidth", 200)
    whole = page.locator("#map img").get_attribute("src")
    words = page.locator("#words label")
    assert words.first.inner_text() == "Whole answer"
    if words.count() > 1:  # an answer of random weights may have no word
        words.nth(1).click()
        page.wait_for_function("old => document.querySelector('#map img').src !== old", arg=whole)
    asked(page, photo)
    expect(page, "#map").to_be_hidden()  # it was of another answer


def test_a_box_is_dragged_and_rides_with_one_question(page, photo):
    upload(page, photo)
    picture = page.locator("#part img")
    expect(page, "#part img").to_have_js_property("naturalWidth", 200)
    picture.scroll_into_view_if_needed()
    frame = picture.bounding_box()
    page.mouse.move(frame["x"] + frame["width"] * 0.25, frame["y"] + frame["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.75, frame["y"] + frame["height"] * 0.9, steps=4)
    page.mouse.up()
    edges = [float(edge) for edge in page.input_value("#box :is(input, textarea)").split(",")]
    assert edges == pytest.approx([0.25, 0.5, 0.75, 0.9], abs=0.02)
    drawn = page.locator(".drawn-box").bounding_box()
    assert drawn["x"] == pytest.approx(frame["x"] + frame["width"] * 0.25, abs=4)
    assert drawn["width"] == pytest.approx(frame["width"] * 0.5, abs=8)
    ask(page, "What is this?")
    expect_text(page, "#status", "GiB in use")
    expect(page, "#chat .user-row img").to_have_count(2)  # the photo and its part
    page.wait_for_function("document.querySelectorAll('#chat .user-row img')[1].naturalWidth > 0")
    assert page.locator("#chat .user-row img").nth(1).evaluate("part => part.naturalWidth") == pytest.approx(100, abs=4)
    expect(page, "#box :is(input, textarea)").to_have_value("")
    expect(page, ".drawn-box").to_have_count(0)
    ask(page, "And the whole?")
    expect(page, "#chat .message.bot").to_have_count(2)
    expect(page, "#chat .user-row img").to_have_count(2)


def test_a_box_that_is_none_is_said(page, photo):
    upload(page, photo)
    page.fill("#box :is(input, textarea)", "0.9,0.1,0.2,0.3")
    ask(page, "What is this?")
    expect_text(page, "#chat", "⚠ the box 0.9,0.1,0.2,0.3 is empty")
    expect(page, "#question textarea").to_have_value("What is this?")
    expect(page, "#box :is(input, textarea)").to_have_value("0.9,0.1,0.2,0.3")
    page.click("#no-box")


def test_another_checkpoint_answers_without_a_restart(page, photo, engines):
    page.click("#checkpoint input")
    page.get_by_role("option", name="checkpoint-10").click()
    asked(page, photo)
    assert engines.loaded("checkpoint-2") is None
    assert engines.loaded("checkpoint-10") is not None
    page.click("#checkpoint input")
    page.get_by_role("option", name="checkpoint-2").click()


def test_two_checkpoints_answer_side_by_side(page, photo, engines):
    asked(page, photo)
    page.click("#compare")
    for side in ("left", "right"):
        expect_text(page, f"#{side}-figures", "GiB in use")
    left, right = (page.input_value(f"#{side}-answer textarea") for side in ("left", "right"))
    assert left == right  # copies of one checkpoint
    page.click("#right-name input")
    page.get_by_role("option", name="checkpoint-2 · with an untrained projector").click()
    before = page.inner_text("#right-figures")
    page.click("#compare")
    expect(page, "#right-figures").not_to_contain_text(before)
    expect_text(page, "#right-figures", "GiB in use")
    assert engines.loaded(f"checkpoint-2|{UNTRAINED}") is not None
    assert page.input_value("#left-answer textarea") == left


def test_many_photos_and_one_question(page, photo, tmp_path):
    shutil.copy(photo, tmp_path / "other.png")
    page.get_by_role("tab", name="Many photos").click()
    page.click("#batch-run")
    expect_text(page, "#batch-state", "Nothing to answer")
    page.set_input_files("#batch-files input[type=file]", [str(photo), str(tmp_path / "other.png")])
    expect_text(page, "#batch-files", "other")
    page.fill("#batch-question :is(input, textarea)", "What is it?")
    page.click("#batch-run")
    expect_text(page, "#batch-state", "2 of 2 answered")
    expect_text(page, "#batch-table", "other.png")
    with page.expect_download() as download:
        page.click("#batch-csv")
    rows = list(csv.reader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
    assert [row[0] for row in rows] == ["image", "grey.png", "other.png"]
    assert rows[1][2] == rows[2][2]  # equal photos
    with page.expect_download() as download:
        page.click("#batch-jsonl")
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == [rows[1][2], rows[2][2]]
    (tmp_path / "folder").mkdir()
    shutil.copy(photo, tmp_path / "folder" / "third.png")
    (tmp_path / "folder" / "notes.txt").write_text("no photo")
    with page.expect_file_chooser() as chooser:
        page.click("#batch-folder")
    chooser.value.set_files(str(tmp_path / "folder"))
    expect_text(page, "#batch-files", "third")
    expect_text(page, "body", "notes.txt. Only")  # the browser says what it leaves out
    page.click("#batch-run")
    expect_text(page, "#batch-state", "3 of 3 answered")
    page.get_by_role("tab", name="Chat").click()
