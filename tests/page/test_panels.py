"""The handlers of the page's panels, called as Gradio calls them, with an engine that tells what it was sent."""

import types

import gradio as gr
import pytest
from PIL import Image

from config import Generate
from page.asking import Caller, Shared, answer
from page.beside import BesidePanel
from page.chat import UploadedPhoto
from page.chat_tab import ChatTab
from page.checkpoints import Engines
from page.texts import say
from page.uploads import SessionFiles
from tests.page.driver import SpokenEngine

SETTINGS = (True, 0, 1, 0, 0, 1, 0, 40, "")


def request_of(session):
    return types.SimpleNamespace(session_hash=session, request=None)


@pytest.fixture
def panels(tmp_path):
    shared = Shared(Engines(SpokenEngine(), "c7"), Generate(), SessionFiles(tmp_path))
    with gr.Blocks():
        chat = ChatTab(shared)
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
    other = answer(shared, caller, [{"role": "user", "content": "mine"}], [{"path": history[0]["photos"][0].path}])
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
