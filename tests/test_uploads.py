"""The page opens uploads only, and no photo outlives the page; over HTTP without a browser, and directly."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import test_gui
from answering.remote import RemoteAnswerer
from config import Gui
from errors import UserError
from page.address import check_port
from page.checkpoints import Engines
from page.uploads import NOT_UPLOADED, PREFIX, photo_name, remove_leftovers, upload_folder
from page.uploads import uploaded_photo as check_upload
from paths import REPO_ROOT
from tests.page.driver import served as page_served
from tests.telling import TellingEngine, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # Gradio uses what pandas 3 calls old
posix = pytest.mark.skipif(os.name != "posix", reason="signals and links of POSIX")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's address and the folder of its uploads."""
    uploads = tmp_path_factory.mktemp("uploads")
    with page_served(uploads) as address:
        yield f"{address}/gradio_api", uploads


UNCHANGED = {"__type__": "update"}  # what Gradio sends of an output that an event leaves as it is


def fetch(url, content=None):
    headers = {"content-type": "application/json"}
    body = None if content is None else json.dumps(content).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, headers), timeout=30) as response:
        return response.read().decode()


def call(address, endpoint, *data):
    """The last event of an API call, and what each output is after all of its events; null after an error."""
    event = json.loads(fetch(f"{address}/call/{endpoint}", {"data": data, "session_hash": secrets.token_hex(4)}))[
        "event_id"
    ]
    lines = fetch(f"{address}/call/{endpoint}/{event}").strip().splitlines()
    outputs = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    last = outputs[-1]
    for earlier in filter(None, reversed(outputs[:-1] if last else [])):  # null: a sign of life while Gradio waits
        last = [old if new == UNCHANGED else new for old, new in zip(earlier, last, strict=True)]
    return lines[-2].removeprefix("event: "), last


def upload(address, file):
    boundary = "0123456789abcdef"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    request = urllib.request.Request(
        f"{address}/upload", body, {"content-type": f"multipart/form-data; boundary={boundary}"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        return json.loads(response.read())[0]


def photo(path, **more):
    """What a browser sends of an upload; Gradio takes it for a file by its `meta`."""
    return {"path": str(path), "orig_name": "my.png", "meta": {"_type": "gradio.FileData"}} | more


def sent(payload, longest=40, temperature=0):
    """What a browser sends with a question: box, a chat to join, a part of the photo, checkpoint, settings."""
    return [payload, "add", -1, "", "checkpoint-7", False, temperature, 1, 0, 0, 1, 0, longest, ""]


def shown(data):
    """What the page shows last, and what is in the question box after it."""
    return data[2][-1]["content"][-1]["text"], data[4]


def ask(address, *uploads, text="What?", longest=40, temperature=0):
    kind, data = call(address, "on_ask", *sent({"text": text, "files": list(uploads)}, longest, temperature))
    assert kind == "complete"
    return shown(data)


@pytest.fixture
def secret(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


def test_uploads_are_answered_and_kept_for_an_hour(served, secret):
    address, _ = served
    path = upload(address, secret)
    os.utime(path, (0, 0))
    assert ask(address, photo(path), photo(path))[0] == "(64, 48) (64, 48) What?"
    assert os.stat(path).st_mtime > 0  # its age counts from its last use


@posix
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("after", [False, True], ids=["alone", "after a sound one"])
def test_no_other_file_is_opened_and_none_is_told_of(served, secret, after, meta):
    """What is outside the folder, Gradio refuses; the rest is refused in one sentence."""
    address, uploads = served
    sound = [photo(upload(address, secret))] * after
    (uploads / "link.png").unlink(missing_ok=True)
    (uploads / "link.png").symlink_to(secret)
    before = sorted(uploads.rglob("*"))
    outside = [secret, secret.with_name("none.png"), "/etc/passwd", "/etc/none", REPO_ROOT / "README.md"]
    told = set()
    for path in (*outside, f"{uploads}/../x", "e", "a\0b", uploads, uploads / "none.png", uploads / "link.png"):
        wrong = photo(path) if meta else {"path": str(path)}
        kind, data = call(address, "on_ask", *sent({"text": "What?", "files": [*sound, wrong]}))
        assert "(64, 48)" not in json.dumps(data), path
        if kind == "complete":
            assert Path(path).is_relative_to(uploads)
            told.add(json.dumps(data))
    if meta:
        assert len(told) == 1
        assert json.dumps(NOT_UPLOADED)[1:-1] in told.pop()
    assert sorted(uploads.rglob("*")) == before  # what the page shows, Gradio copies there


def test_no_address_of_a_payload_is_fetched(served, secret, tmp_path):
    """Neither when the photo is shown nor when the question comes back."""
    address, _ = served
    path = upload(address, secret)
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.5)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        payload = photo(path, url=url)
        assert ask(address, payload)[0] == "(64, 48) What?"
        text, box = ask(address, payload, temperature="odd")
        assert text.startswith("⚠ settings")
        assert [file["path"] for file in box["files"]] == [path]
        assert url not in json.dumps(box)
        wrong = {"text": "What?", "files": [photo(url, url=url)]}
        assert call(address, "on_ask", *sent(wrong))[0] == "error"
        with pytest.raises(TimeoutError):
            trap.accept()


def test_equal_uploads_are_files_of_their_own(served, secret):
    """Else the first session to end would take the file from another one that has not asked about it yet."""
    address, uploads = served
    first, second = (Path(upload(address, secret)) for _ in range(2))
    assert first != second
    assert first.read_bytes() == second.read_bytes() == secret.read_bytes()
    assert first.is_relative_to(uploads)
    assert first.name == second.name == secret.name
    first.unlink()
    assert ask(address, photo(second))[0] == "(64, 48) What?"


def test_a_photo_that_is_gone_is_one_sentence_and_the_buttons_come_back(served, secret):
    address, _ = served
    gone = upload(address, secret)
    os.unlink(gone)
    kind, data = call(address, "on_ask", *sent({"text": "What?", "files": [photo(gone)]}))
    assert kind == "complete"
    assert shown(data) == (f"⚠ {NOT_UPLOADED}", {"text": "What?", "files": []})
    # ask, stop, again, …: those that wait come afterwards
    assert data[6:11] == [UNCHANGED | {"interactive": False}] * 5
    kind, data = call(address, "on_ended")
    assert (kind, [update["interactive"] for update in data]) == ("complete", [True] * 4)


@pytest.mark.parametrize(("longest", "temperature"), [("x", 0), (40, 1e308), (-5, 0), ([], 0), (40, {}), (None, 0)])
def test_odd_settings_are_one_sentence(served, secret, longest, temperature):
    address, _ = served
    path = upload(address, secret)
    text, box = ask(address, photo(path), longest=longest, temperature=temperature)
    assert text.startswith("⚠ settings")
    assert (box["text"], [file["path"] for file in box["files"]]) == ("What?", [path])


@pytest.mark.parametrize(
    "data",
    [
        sent("x"),
        sent([1]),
        sent(None),
        sent({"text": 5, "files": [{"path": 5}]}),
        sent({"text": "?", "files": {"path": "x"}}),
        sent({"text": "?", "files": ["x", 5, None]}),
        sent({"text": "?", "files": [{}]}),
        sent({"text": "?", "files": [{"path": None, "meta": {"_type": "gradio.FileData"}}]}),
        sent({"text": "?", "files": [{"url": "x", "meta": {"_type": "gradio.FileData"}}]}),
        sent({"files": 5}),
        [],
        [None] * 14,
    ],
)
def test_the_server_goes_on_after_what_gradio_refuses(served, secret, data):
    address, _ = served
    call(address, "on_ask", *data)
    assert ask(address, photo(upload(address, secret)), text="Still there?")[0] == "(64, 48) Still there?"


def test_an_unknown_endpoint_is_not_found(served):
    address, _ = served
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(address, "other")
    assert caught.value.code == 404
    assert "no such endpoint" in caught.value.read().decode()


def test_half_a_surrogate_pair_is_said(served, secret):
    address, _ = served
    assert "is not valid Unicode text" in ask(address, photo(upload(address, secret)), text="a\ud800")[0]


@pytest.mark.parametrize("upload", [None, {}, "x", [1], 5, {"path": None}, {"path": 5}, {"path": "/etc/passwd"}])
def test_what_is_no_upload(tmp_path, upload):
    with pytest.raises(UserError) as caught:
        check_upload(upload, tmp_path)
    assert str(caught.value) == NOT_UPLOADED
    assert photo_name(upload) == "photo"


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from page.uploads import upload_folder
{before}
with upload_folder(Path({parent!r})) as folder:
    (folder / "photo.png").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


def holder(parent, before=""):
    code = HOLD.format(root=str(REPO_ROOT), parent=str(parent), before=before)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_photos_of_a_killed_page_go_at_the_next_start_and_those_of_a_running_one_stay(tmp_path):
    running, running_folder = holder(tmp_path)
    killed, killed_folder = holder(tmp_path)
    killed.kill()
    killed.wait()
    assert os.path.isdir(killed_folder)
    try:
        with upload_folder(tmp_path) as folder:
            assert not os.path.exists(killed_folder)
            assert os.path.isfile(f"{running_folder}/photo.png")
            assert folder.is_dir()
            if os.name == "posix":
                assert folder.stat().st_mode & 0o077 == 0
        assert not folder.exists()
    finally:
        running.kill()
        running.wait()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@posix
def test_what_is_not_ours_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / f"{PREFIX}link.lock").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}link").mkdir()
    (tmp_path / "other.lock").touch()
    remove_leftovers(tmp_path)
    assert elsewhere.read_text() == "kept"
    assert (tmp_path / f"{PREFIX}link").is_dir()
    assert (tmp_path / "other.lock").exists()


@posix
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.nightly)])
def test_a_page_that_is_told_to_end_removes_its_photos(tmp_path, name):
    process, folder = holder(tmp_path, "import test_gui\ntest_gui.end_on_signals()")
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=60) == 0
    assert not os.path.exists(folder)
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_served_by_ipv6(tmp_path):
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        gui = Gui(host="::1", port=probe.getsockname()[1])
    check_port(gui)
    with page_served(tmp_path / "uploads", host="::1", port=gui.port):
        assert "Ask about a photo" in fetch(f"http://[::1]:{gui.port}/")


def test_uploads_reach_the_server_as_files_and_its_errors_the_chat(tmp_path):
    engine = TellingEngine()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.jpg")
    with (
        running(engine) as server,
        page_served(tmp_path / "uploads", Engines(RemoteAnswerer(server), "checkpoint-7")) as page,
    ):
        address = f"{page}/gradio_api"
        uploaded = photo(upload(address, tmp_path / "red.jpg"))
        assert ask(address, uploaded, text="Which?")[0] == "(64, 48) Which?"
        settings = engine.asked[-1][1]
        assert (settings.max_new_tokens, settings.temperature) == (40, 0)
        said, box = ask(address, uploaded, text="defect")
    assert said == f"⚠ {server}/v1 refuses: a defect of this server; its operator finds the cause in its log"
    assert box["text"] == "defect"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --checkpoint DIR, or --server URL"),
        (["--server", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1/v1"),
        (["--server", "http://127.0.0.1:1", "llm.path=x"], "with --server, only generate.* and gui.* can be set here"),
    ],
)
def test_a_wrong_server_is_said_at_the_start(options, message):
    with pytest.raises(UserError, match=message):
        test_gui.main(options)
