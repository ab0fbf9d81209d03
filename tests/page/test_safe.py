"""Who may use the page, whose turn it is, and what stays behind: over HTTP and with `gradio_client`, no browser."""

import datetime
import gc
import json
import os
import time
from pathlib import Path

import gradio as gr
import gradio_client
import httpx2
import pytest
from gradio.state_holder import StateHolder
from PIL import Image

from page.checkpoints import Engines
from page.sessions import forget_closed, forget_removed
from page.uploads import SessionFiles, store
from tests.page.driver import SpokenEngine, proxied, served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # Gradio uses what pandas 3 calls old
SETTINGS = [False, 0, 1, 0, 0, 1, 0, 40, ""]


@pytest.fixture(scope="module")
def engine():
    return SpokenEngine()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(engine, uploads):
    with served(uploads, Engines(engine, "checkpoint-7")) as address:
        yield address


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def client_of(address, **options):
    return gradio_client.Client(address, verbose=False, analytics_enabled=False, **options)


def ask(client, photo, text, where="add"):
    files = [gradio_client.handle_file(photo)] if photo else []
    return client.submit({"text": text, "files": files}, where, -1, "", "checkpoint-7", *SETTINGS, api_name="/on_ask")


def said(outputs):
    return outputs[0][-1]["content"][-1]["text"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_example_of_the_docs(address, photo):
    """`docs/page.md` has these calls."""
    client = client_of(address)
    assert client.predict(api_name="/checkpoints") == ["checkpoint-7"]
    answer = client.predict([gradio_client.handle_file(photo)], "What is it?", api_name="/answer")
    assert answer == "(64, 48) What is it?"
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/answer", "/checkpoints"}


def test_mistakes_of_a_program_are_sentences(address, photo):
    client = client_of(address)
    for arguments, sentence in {
        (" ",): "The question is empty",
        ("long",): "the dialogue is <b>too long</b>",
        ("?", "checkpoint-7", -1): "settings: ",
    }.items():
        with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
            client.predict([gradio_client.handle_file(photo)], *arguments, api_name="/answer")
    with pytest.raises(gradio_client.exceptions.AppError, match=r".+"):
        client.predict([{"path": "/etc/passwd"}], "?", api_name="/answer")


def test_sessions_do_not_see_each_other_and_take_turns(address, photo, engine):
    first, second = client_of(address), client_of(address)
    engine.go_on.clear()
    waiting = ask(first, photo, "wait")
    wait_for(lambda: engine.at_work == 1)
    behind = ask(second, photo, "secret")
    wait_for(lambda: any("1 before you" in json.dumps(step) for step in behind.outputs()))
    engine.go_on.set()
    assert said(waiting.result(60)) == "(64, 48) wait"
    assert said(behind.result(60)) == "(64, 48) secret"
    assert said(ask(first, None, "and?").result(60)) == "(64, 48) wait + and?"


def test_a_client_that_goes_away_frees_its_place(address, photo, engine):
    """Also one that waits: S22 was a question that came back after it was given up."""
    first, second, third = (client_of(address) for _ in range(3))
    engine.go_on.clear()
    job = ask(first, photo, "slow")
    wait_for(lambda: engine.at_work == 1)
    given_up = ask(second, photo, "given up")
    wait_for(lambda: any("before you" in json.dumps(step) for step in given_up.outputs()))
    given_up.cancel()
    job.cancel()
    assert said(ask(third, photo, "mine").result(60)) == "(64, 48) mine"
    wait_for(lambda: engine.at_work == 0)
    assert said(ask(second, photo, "new").result(60)) == "(64, 48) new"


def names_in(folder):
    """Names of the files; a folder may be removed meanwhile, of which `rglob` makes an error."""
    return {name for _, _, files in os.walk(folder) for name in files}


def test_uploads_go_when_the_session_ends(address, photo, uploads):
    Image.new("RGB", (63, 47), "green").save(photo.with_name("green.png"))
    client = client_of(address)
    assert said(ask(client, photo.with_name("green.png"), "What?").result(60)) == "(63, 47) What?"
    assert list(uploads.rglob("green.png"))
    client.close()
    wait_for(lambda: "green.png" not in names_in(uploads))


def test_uploads_of_refused_questions_go_too(address, photo, uploads, engine):
    """The session is busy, or the question is empty."""
    client = client_of(address)
    engine.go_on.clear()
    waiting = ask(client, photo, "wait")
    wait_for(lambda: engine.at_work == 1)
    for name, colour in {"blue.png": "blue", "white.png": "white"}.items():
        Image.new("RGB", (63, 47), colour).save(photo.with_name(name))
    ask(client, photo.with_name("blue.png"), "now?").result(60)
    files = [gradio_client.handle_file(photo.with_name("white.png"))]
    for question in ("now?", " "):
        with pytest.raises(gradio_client.exceptions.AppError):
            client.predict(files, question, api_name="/answer")
    assert list(uploads.rglob("blue.png"))
    assert list(uploads.rglob("white.png"))
    engine.go_on.set()
    waiting.result(60)
    client.close()
    wait_for(lambda: not {"blue.png", "white.png"} & names_in(uploads))


def test_a_password_is_asked_for_everywhere(tmp_path, photo):
    with served(tmp_path / "uploads", user="me", password="secret") as address:
        (tmp_path / "uploads" / "x.png").write_bytes(photo.read_bytes())
        for path in ("/gradio_api/info", "/config", f"/gradio_api/file={tmp_path}/uploads/x.png"):
            assert httpx2.get(address + path, trust_env=False, timeout=60).status_code == 401, path
        client = client_of(address, auth=("me", "secret"))
        answer = client.predict([gradio_client.handle_file(photo)], "What is it?", api_name="/answer")
        assert answer == "(64, 48) What is it?"
        with pytest.raises(Exception, match="(?i)login|credentials|auth"):
            client_of(address, auth=("me", "wrong"))


def test_behind_a_reverse_proxy(tmp_path, photo):
    """A proxy offers the page at /vqa and hands on the rest of each path."""
    with served(tmp_path / "uploads", root_path="/vqa") as address, proxied(address) as outside:
        with httpx2.Client(base_url=f"{outside}/vqa", trust_env=False, timeout=60) as browser:
            assert "vqa_language" in browser.get("/").text
            assert browser.get("/config").json()["root"] == f"{outside}/vqa"
            assert browser.get(outside).status_code == 500  # the proxy has nothing there
        client = client_of(f"{outside}/vqa/")
        answer = client.predict([gradio_client.handle_file(photo)], "What is it?", api_name="/answer")
        assert answer == "(64, 48) What is it?"


def test_a_session_keeps_no_more_after_more_questions(address, photo):
    client = client_of(address)
    sizes = []
    for _ in range(4):
        ask(client, photo, "again").result(60)
        holders = [each for each in gc.get_objects() if type(each) is StateHolder]
        (state,) = [holder[client.session_hash] for holder in holders if client.session_hash in holder]
        sizes.append((len(state.blocks_config.blocks), len(state.config_values)))
    assert sizes[0] == sizes[3]


def test_closed_sessions_are_forgotten_after_a_time():
    with gr.Blocks() as blocks:
        gr.Textbox()
    holder = StateHolder()
    holder.set_blocks(blocks)
    for name in ("open", "closed", "closed long ago", "open long ago"):
        holder[name].is_closed = name.startswith("closed")
        if "long" in name:
            holder.time_last_used[name] -= datetime.timedelta(hours=2)
    forget_closed(holder)
    assert list(holder.session_data) == list(holder.time_last_used) == ["open", "closed", "open long ago"]


def test_the_names_of_removed_files_are_forgotten(tmp_path):
    here = tmp_path / "here"
    here.touch()
    known = [{str(here), str(tmp_path / "gone")}, set()]
    forget_removed(known)
    assert known == [{str(here)}, set()]


def test_no_call_passes_by_the_queue(address):
    """Forty of them would take all threads, of which the question that is being answered needs one."""
    body = {"data": [[], "?", None, 0, 0, ""], "session_hash": "x"}
    response = httpx2.post(f"{address}/gradio_api/run/answer", json=body, timeout=60)
    assert response.status_code == 404, response.text


def test_a_file_goes_when_the_last_session_lets_go_of_it(tmp_path):
    files = SessionFiles(tmp_path)
    one, other = store(tmp_path, b"one", "a.png"), store(tmp_path, b"other", "a.png")
    files.hold("first", one, other)
    files.hold("second", one)
    files.release("first")
    assert (os.path.exists(one), os.path.exists(other)) == (True, False)
    files.release("second", keep=[one])
    assert os.path.exists(one)
    files.release("second")
    assert list(tmp_path.iterdir()) == []


def test_no_session_removes_a_file_of_the_page(tmp_path):
    files, icon = SessionFiles(tmp_path), store(tmp_path, b"icon", "icon.png")
    files.hold(None, icon)
    files.hold("any", icon)
    files.release("any")
    assert os.path.exists(icon)


def test_a_full_disk_leaves_no_half_of_a_photo(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        store(tmp_path, b"photo", "a.png")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == []
    assert Path(store(tmp_path, b"photo", "a.png")).read_bytes() == b"photo"


def test_nothing_outside_the_folder_is_let_go(tmp_path):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "mine.png").touch()
    files = SessionFiles(tmp_path / "uploads")
    files.hold("first", str(tmp_path / "mine.png"), str(tmp_path / "uploads"), "a\0b")
    files.release("first")
    assert (tmp_path / "mine.png").exists()
    assert (tmp_path / "uploads").is_dir()
