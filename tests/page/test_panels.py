"""The handlers of the page's panels, called as Gradio calls them, with an engine that tells what it was sent."""

import gc
import types
import weakref
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from config import Generate
from page.asking import Caller, Shared, Work, answer
from page.batch_tab import BatchTab
from page.beside import BesidePanel
from page.chat import UploadedPhoto, in_box
from page.chat_tab import ChatTab
from page.checkpoints import Engines
from page.examples import examples_panel
from page.kept_panel import KeptPanel
from page.settings import checkpoint_choice, settings_panel
from page.texts import say
from page.uploads import SessionFiles, store
from tests.page.driver import SpokenEngine

SETTINGS = (True, 0, 1, 0, 0, 1, 0, 40, "")


def request_of(session):
    return types.SimpleNamespace(session_hash=session, request=None)


@pytest.fixture
def panels(tmp_path):
    shared = Shared(Engines(SpokenEngine(), "c7"), Generate(), SessionFiles(tmp_path))
    with gr.Blocks():
        chat = ChatTab(shared)
        chat.connect(checkpoint_choice(shared.engines), settings_panel(shared.generate), gr.Textbox())
        return shared, chat, BesidePanel(chat, shared)


@pytest.fixture
def history(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    photo = UploadedPhoto(str(tmp_path / "a.png"), "a.png")
    return [{"role": "user", "content": "slow", "photos": [photo]}, {"role": "assistant", "content": "on"}]


def test_side_by_side_obeys_stop_and_takes_its_turn(panels, history):
    shared, chat, beside = panels
    engine = shared.engines.loaded("c7")
    steps = beside.on_compare(request_of("one"), history, "c7", "c7", *SETTINGS)
    shown = next(left for _, left, *_ in steps if "on on" in left)
    caller = Caller("other", "en", "c7", {"system": ""})
    photo = {"path": history[0]["photos"][0].path}
    other = answer(shared, caller, Work(), [{"role": "user", "content": "mine"}], [photo])
    assert [next(other).line for _ in range(2)][1] == say("en", "waiting", ahead=1)
    assert next(beside.on_compare(request_of("one"), history, "c7", "c7", *SETTINGS))[0] == say("en", "busy")
    chat.on_stop(request_of("one"))
    *_, (state, left, right, figures, none) = steps
    assert state == say("en", "stopped")
    assert (left, right, none) == (shown, "", "")
    assert "tokens: " in figures
    assert engine.closed_early
    assert engine.at_work == 0
    *_, last = other
    assert last.history[-1]["content"] == "(64, 48) mine"
    assert shared.running == {}


def test_names_are_no_markdown(panels, batch, history):
    (_, chat, beside), (tab, photos) = panels, batch
    name = "![](http://127.0.0.1/x.png)"
    photo = {"path": history[0]["photos"][0].path}
    asked = {"text": "What?", "files": [photo]}
    states = [line for line, *_ in tab.on_run(request_of("one"), photos, "What?", name, *SETTINGS)]
    states += [line for line, *_ in beside.on_compare(request_of("one"), history, name, "c7", *SETTINGS)]
    states += [
        step[chat.status]
        for step in chat.on_ask(request_of("one"), [], "", asked, "add", -1, "", name, *SETTINGS)
        if chat.status in step
    ]
    named = [state for state in states if "x\\.png" in state]
    assert len(named) == 5  # one is loaded in each; the chat shows its error elsewhere
    assert all("\\!\\[\\]\\(http" in state for state in named)


def test_an_answer_that_waits_to_be_shown_holds_no_model(panels, history):
    shared, *_ = panels
    gone, work = weakref.ref(shared.engines.loaded("c7")), Work()
    photo = {"path": history[0]["photos"][0].path}
    asked = [{"role": "user", "content": "What?"}]
    steps = answer(shared, Caller("one", "en", "c7", {"system": ""}), work, asked, [photo])
    while next(steps).busy:
        pass
    shared.engines._loaded["c7"] = SpokenEngine()  # as if another session had asked another one
    gc.collect()
    assert gone() is None


def test_a_session_asks_one_thing_at_a_time(panels, history):
    shared, chat, _ = panels
    asked = in_box("What?", history[0]["photos"])
    first, second = (chat.on_ask(request_of("one"), [], "", asked, "add", -1, "", "c7", *SETTINGS) for _ in range(2))
    next(first)
    assert next(second) == {chat.status: say("en", "busy")}
    second.close()
    assert chat.on_ended(request_of("one")) == [gr.update(interactive=False)] * 4  # the first one is at work
    assert chat.on_ended(request_of("two")) == [gr.update(interactive=True)] * 4
    assert [*first][-1][chat.messages][-1]["content"] == "(64, 48) What?"
    assert shared.running == {}
    assert chat.on_ended(request_of("one")) == [gr.update(interactive=True)] * 4


def test_the_last_update_of_an_answer_leaves_the_box_to_the_next_question(panels, history):
    """Gradio sends it twice, and the next question may be typed meanwhile."""
    _, chat, _ = panels
    asked = in_box("What?", history[0]["photos"])
    *early, last = chat.on_ask(request_of("one"), [], "", asked, "add", -1, "", "c7", *SETTINGS)
    assert all(step[chat.question] == in_box("") for step in early)
    assert early[-1][chat.shown] == last[chat.shown]
    assert chat.question not in last
    # a click on a button that is enabled before the event has ended would be lost
    assert all(step[button] == gr.update(interactive=False) for step in [*early, last] for button in chat.waiting)


def test_the_last_update_of_an_error_leaves_the_box_too(panels, history):
    """The question that comes back would come twice, the second time over what is typed meanwhile."""
    _, chat, _ = panels
    asked = in_box("memory", history[0]["photos"])
    *_, back, last = chat.on_ask(request_of("one"), [], "", asked, "add", -1, "1,2,3,4", "c7", *SETTINGS)
    assert (back[chat.question]["text"], back[chat.box]) == ("memory", "1,2,3,4")
    assert last.keys().isdisjoint({chat.question, chat.box})
    assert all(step[button] == gr.update(interactive=False) for step in (back, last) for button in chat.waiting)
    assert last[chat.shown] == back[chat.shown]


@pytest.fixture
def batch(panels, tmp_path):
    """The batch tab, and two photos that wait in it."""
    shared, *_ = panels
    with gr.Blocks():
        tab = BatchTab(shared)
    photos = []
    for number in (1, 2):
        Image.new("RGB", (number, 1)).save(tmp_path / "drawn.png")
        path = store(tmp_path, (tmp_path / "drawn.png").read_bytes(), f"{number}.png")
        photos.append({"path": path, "orig_name": f"{number}.png"})
    return tab, photos


def names_in(folder):
    return sorted(path.name for path in folder.glob("*/*"))


def test_a_new_chat_leaves_the_batch_tab_its_files(panels, batch, tmp_path):
    (shared, chat, _), (tab, photos) = panels, batch
    files = ["1.png", "2.png", "answers.csv", "answers.jsonl"]
    assert "2 of 2" in [*tab.on_run(request_of("one"), photos, "What?", "c7", *SETTINGS)][-1][0]
    chat.on_clear(request_of("one"), None)
    assert names_in(tmp_path) == files
    assert "1 of 1" in [*tab.on_run(request_of("one"), photos[:1], "Else?", "c7", *SETTINGS)][-1][0]
    assert names_in(tmp_path) == ["1.png", *files[2:]]
    shared.end("one")
    assert names_in(tmp_path) == []


def test_a_tab_that_is_closed_during_a_batch_leaves_nothing(panels, batch, tmp_path):
    shared, (tab, photos) = panels[0], batch
    steps = tab.on_run(request_of("one"), photos, "What?", "c7", *SETTINGS)
    next(step for step in steps if "2 of 2" in step[0])
    shared.end("one")
    assert "answers.csv" in str([*steps])
    assert names_in(tmp_path) == []
    assert shared.running == {}


def test_a_new_photo_in_a_new_chat_ends_the_old_chat(panels, batch, tmp_path):
    (shared, chat, _), (_, photos) = panels, batch
    history = []
    for photo in photos:
        shared.files.hold("one", photo["path"])
        payload = {"text": "What?", "files": [photo]}
        *_, last = chat.on_ask(request_of("one"), history, "", payload, "new", -1, "", "c7", *SETTINGS)
        history = last[chat.messages]
    assert [message["content"] for message in history] == ["What?", "(2, 1) What?"]
    assert names_in(tmp_path) == ["2.png"]


def test_a_system_message_that_is_no_text_is_said_in_the_batch_tab(batch):
    tab, photos = batch
    *_, (state, *_) = tab.on_run(request_of("one"), photos, "What?", "c7", *SETTINGS[:-1], "a\ud800")
    assert "the system message is not valid Unicode" in state


def test_a_chat_is_not_downloaded_without_its_photo(panels, history, tmp_path):
    shared, chat, _ = panels
    with gr.Blocks():
        kept = KeptPanel(chat, shared)
    file, state = kept.on_download(request_of("one"), history, "c7").values()
    assert (Path(file).name, state) == ("chat.zip", "")
    (tmp_path / "a.png").unlink()
    updates = kept.on_download(request_of("one"), history, "c7")
    assert set(updates.values()) == {say("en", "gone"), None}


def test_the_pictures_of_the_samples_stay(panels, tmp_path):
    shared, chat, _ = panels
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png")
    with gr.Blocks() as page:
        examples_panel(chat.question, {"s.png": (tmp_path / "drawn.png").read_bytes()}, shared)
    staying = {Path(path).name for block in page.blocks.values() for path in block.keep_in_cache}
    assert "icon-s.png" in staying
