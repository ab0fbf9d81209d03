"""The pieces of the page without a browser: texts, line, kept chats, checkpoints, password, address."""

import base64
import gc
import io
import json
import re
import shutil
import socket
import string
import threading
import types
import weakref

import pytest
from PIL import Image

import test_gui
from answering.answer import Answerer
from config import Config, Generate, Gui, load_config
from errors import UserError
from model.checkpoint import load_checkpoint
from model.portable import portable_config
from page.address import check_port, in_url
from page.asking import decoding
from page.chat import UploadedPhoto, files_of, with_part
from page.checkpoints import UNTRAINED, Engines
from page.kept import COPY_PX, opened, to_keep
from page.line import WaitingLine
from page.texts import TEXTS, language_of, say
from page.uploads import store
from paths import REPO_ROOT
from tests.page.driver import SpokenEngine

CHINESE = re.compile("[\u3400-\u9fff]")
SAME_IN_BOTH = {"top_p"}
OTHER_LANGUAGE = {"switch"}  # the button names the language it leads to


def fields(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_each_text_is_in_one_language(key):
    english, chinese = TEXTS[key]
    if key not in OTHER_LANGUAGE:
        assert not CHINESE.search(english)
        assert CHINESE.search(chinese) or key in SAME_IN_BOTH
    if key not in ("batch_info",):  # its braces are letters
        assert fields(english) == fields(chinese)


def test_each_text_is_used():
    sources = "".join(
        file.read_text(encoding="utf-8") for file in (REPO_ROOT / "page").glob("*.py") if file.name != "texts.py"
    )
    sources = re.sub(r'elem_id="[^"]*"', "", sources)
    assert [key for key in TEXTS if f'"{key}"' not in sources] == []


@pytest.mark.parametrize(
    ("cookies", "header", "language"),
    [
        ({}, "zh-CN,zh;q=0.9", "zh"),
        ({}, "en-GB", "en"),
        ({}, "de", "en"),
        ({"vqa_language": "en"}, "zh", "en"),
        ({"vqa_language": "zh"}, "en", "zh"),
        ({"vqa_language": "../x"}, "en", "en"),
    ],
)
def test_language_of_a_request(cookies, header, language):
    request = types.SimpleNamespace(request=object(), cookies=cookies, headers={"accept-language": header})
    assert language_of(request) == language
    assert language_of(None) == "en"


def test_the_line_gives_turns_in_the_order_of_arrival():
    line, order, arrived = WaitingLine(), [], threading.Semaphore(0)

    def work(number):
        with line.place() as place:
            arrived.release()
            while place.ahead(5):
                pass
            order.append(number)

    with line.place() as first:
        assert first.ahead(0) == 0
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            assert arrived.acquire(timeout=30)
        with line.place() as last:
            assert last.ahead(0) == 6
        assert order == []
    for thread in threads:
        thread.join(timeout=30)
    assert order == [0, 1, 2, 3, 4]


def test_a_place_is_left_after_an_error():
    line = WaitingLine()
    with pytest.raises(KeyError), line.place():
        raise KeyError
    with line.place() as place:
        assert place.ahead(0) == 0


@pytest.fixture
def dialogue(tmp_path):
    """A folder of uploads and a dialogue about a large photo, with a box in its second question."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((1200, 600)).save(file, "PNG")
    photo = UploadedPhoto(store(tmp_path, file.getvalue(), "my photo.png"), "my photo.png")
    asked = with_part({"role": "user", "content": "And?", "photos": []}, (0.0, 0.0, 0.5, 0.5),
                      Image.open(photo.path).convert("RGB"), tmp_path)  # fmt: skip
    return tmp_path, [
        {"role": "user", "content": "What?", "photos": [photo]},
        {"role": "assistant", "content": "A cat."},
        asked,
        {"role": "assistant", "content": "猫"},
    ]


def test_a_kept_chat_comes_back_with_small_photos(dialogue):
    folder, history = dialogue
    chat = json.loads(json.dumps(to_keep(history, "abc")))  # as the browser stores it
    assert (chat["id"], chat["title"]) == ("abc", "What?")
    back, chat_id = opened(chat, folder)
    assert chat_id == "abc"
    assert [message["content"] for message in back] == ["What?", "A cat.", "And?", "猫"]
    assert Image.open(back[0]["photos"][0].path).size == (COPY_PX, COPY_PX // 2)
    assert back[2]["box"] == (0.0, 0.0, 0.5, 0.5)
    assert Image.open(back[2]["part"]).size == (COPY_PX // 2, COPY_PX // 4)
    assert len(files_of(back)) == 2


@pytest.mark.parametrize(
    ("box", "part"), [((600, 100, 1000, 500), (171, 171)), ((10, 10, 210, 210), (87, 87)), ((0, 0, 1, 1), (1, 1))]
)
def test_a_box_in_pixels_is_kept_for_the_smaller_photo(dialogue, box, part):
    folder, history = dialogue
    image = Image.open(history[0]["photos"][0].path).convert("RGB")
    history[2] = with_part({"role": "user", "content": "And?", "photos": []}, box, image, folder)
    back, _ = opened(json.loads(json.dumps(to_keep(history, "abc"))), folder)
    size = Image.open(back[2]["part"]).size
    assert all(abs(own - expected) <= 1 for own, expected in zip(size, part, strict=True))


def test_a_photo_that_is_gone_is_left_out(dialogue):
    folder, history = dialogue
    shutil.rmtree(folder)
    assert to_keep(history, "abc")["messages"][0]["photos"] == []


def picture_url(content=None):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(content or file.getvalue()).decode()


GOOD = {"role": "user", "content": "?", "photos": [[picture_url(), "a.jpg"]]}
SAID = {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        [GOOD],
        [SAID, GOOD],
        [GOOD, GOOD],
        [GOOD | {"photos": []}, SAID],
        [GOOD | {"photos": [["/etc/passwd", "a"]]}, SAID],
        [GOOD | {"photos": [["http://127.0.0.1/x.png", "a"]]}, SAID],
        [GOOD | {"photos": [[picture_url(b"no photo"), "a"]]}, SAID],
        [GOOD | {"content": "a\ud800"}, SAID],
        [GOOD | {"content": 5}, SAID],
        [GOOD | {"box": [0.5, 0.5, 0.1, 0.1]}, SAID],
        [GOOD | {"box": [0, 0, 5, 5]}, SAID],
        [GOOD, SAID, GOOD | {"photos": [[picture_url(b"no photo"), "a"]]}, SAID],
        [GOOD | {"path": "/etc/passwd"}, SAID],
    ],
)
def test_what_is_no_kept_chat(tmp_path, messages):
    with pytest.raises(UserError, match="cannot be opened"):
        opened({"id": "x", "title": "x", "messages": messages}, tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_a_name_in_a_kept_chat_leads_nowhere(tmp_path):
    (tmp_path / "uploads").mkdir()
    chat = {"id": "x", "title": "x", "messages": [GOOD | {"photos": [[picture_url(), "../../x.jpg"]]}, SAID]}
    history, _ = opened(chat, tmp_path / "uploads")
    assert history[0]["photos"][0].path.startswith(str(tmp_path / "uploads"))
    assert [path.name for path in tmp_path.iterdir()] == ["uploads"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_that_training_deleted_is_no_longer_offered(tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-10"):
        shutil.copytree(tiny_checkpoint, run / name)
    overrides = {"model_root": str(tiny_checkpoint.parent.parent)}
    model = load_checkpoint(run / "checkpoint-2", overrides=overrides)
    engines = Engines(Answerer(model), "checkpoint-2", run / "checkpoint-2", overrides)
    shutil.rmtree(run / "checkpoint-2")
    assert [name for _, name in engines.names()] == ["checkpoint-10", "checkpoint-2"]  # still in memory
    engines.get("checkpoint-10")
    assert [name for _, name in engines.names()] == ["checkpoint-10"]
    with pytest.raises(UserError, match="there is no checkpoint 'checkpoint-2' any more"):
        engines.get("checkpoint-2")


def test_checkpoints_are_listed_and_only_those_that_are_asked_are_in_memory(tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-10"):
        shutil.copytree(tiny_checkpoint, run / name)
    shutil.copytree(tiny_checkpoint, run / "checkpoint-11")
    (run / "checkpoint-11" / "provenance.json").unlink()
    overrides = {"model_root": str(tiny_checkpoint.parent.parent)}
    model = load_checkpoint(run / "checkpoint-2", overrides=overrides)
    gone = weakref.ref(model)
    engines = Engines(Answerer(model), "checkpoint-2", run / "checkpoint-2", overrides)
    del model
    assert [name for _, name in engines.names()] == ["checkpoint-10", "checkpoint-2"]
    shown = engines.names()[0][0]
    assert re.fullmatch(r"checkpoint-10( · \d+\.\d{4})? · \d{4}-\d\d-\d\d \d\d:\d\d", shown)

    trained, untrained = engines.get("checkpoint-2", f"checkpoint-2|{UNTRAINED}")
    assert trained.model.LLM is untrained.model.LLM
    weights, fresh = (next(engine.model.feature_proj.parameters()) for engine in (trained, untrained))
    assert not weights.equal(fresh)
    assert next(trained.model.feature_proj.parameters()) is weights
    photo = Image.linear_gradient("L").convert("RGB")
    short = Generate(max_new_tokens=3)
    before = trained.answer(photo, "What?", short)
    untrained.answer(photo, "What?", short)
    assert trained.answer(photo, "What?", short) == before
    del trained, untrained, weights, fresh

    assert engines.loaded("checkpoint-10") is None
    engines.get("checkpoint-10")
    gc.collect()
    assert gone() is None
    assert engines.loaded("checkpoint-2") is None
    with pytest.raises(UserError, match="no checkpoint '../x' any more"):
        engines.get("../x")


def test_a_wrong_name_leaves_the_only_answerer():
    engines = Engines(SpokenEngine(), "c7")
    for name in ("typo", "c7|typo"):
        with pytest.raises(UserError, match="no checkpoint"):
            engines.get(name)
    assert engines.get("c7") == [engines.loaded("c7")]


def test_the_password_comes_from_the_environment_and_goes_nowhere(monkeypatch):
    monkeypatch.delenv("VQA_GUI_PASSWORD", raising=False)
    assert test_gui.with_password(Gui()).password is None
    with pytest.raises(UserError, match="set the environment variable VQA_GUI_PASSWORD"):
        test_gui.with_password(Gui(user="me"))
    monkeypatch.setenv("VQA_GUI_PASSWORD", "secret")
    gui = test_gui.with_password(Gui(user="me"))
    assert gui.password == "secret"
    assert "secret" not in repr(gui)
    config: Config = load_config("config.yaml", {"gui.user": "me", "gui.password": "secret"})
    assert config.gui.password == "secret"
    assert "secret" not in json.dumps(portable_config(config))
    with pytest.raises(UserError, match="gui.password needs gui.user"):
        test_gui.with_password(Gui(password="secret"))
    with pytest.raises(UserError, match="VQA_GUI_PASSWORD needs gui.user"):
        test_gui.with_password(Gui())
    with pytest.raises(UserError, match="'gui.password' = …: Input should be a valid string") as caught:
        load_config("config.yaml", {"gui.password": 123456})
    assert "123456" not in str(caught.value)


@pytest.mark.parametrize("path", ["vqa", "/vqa/", "/v qa", "javascript:x"])
def test_a_root_path_that_is_none(path):
    with pytest.raises(UserError, match="root_path"):
        load_config("config.yaml", {"gui.root_path": path})


def test_sentences_of_both_languages():
    assert say("en", "waiting", ahead=2) == "Waiting: 2 before you in the queue"
    assert say("zh", "waiting", ahead=2) == "排队中：前面还有 2 个"


def test_hosts_of_both_kinds():
    assert (in_url("::1"), in_url("127.0.0.1")) == ("[::1]", "127.0.0.1")
    with pytest.raises(UserError, match=r"^no\.such\.host\.invalid is no address .*gui\.host=127\.0\.0\.1"):
        check_port(Gui(host="no.such.host.invalid"))
    with pytest.raises(UserError, match="cannot serve on 192.0.2.1:7860"):  # an address for documentation
        check_port(Gui(host="192.0.2.1"))


def test_a_taken_port_of_ipv6_is_said():
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as other:
        try:
            other.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot serve on \[::1\]:{port}"):
            check_port(Gui(host="::1", port=port))
    check_port(Gui(host="::1", port=port))


def test_the_likeliest_words_are_asked_for_in_any_case():
    """A server may have another temperature of its own."""
    settings = {"temperature": 0, "top_p": 1.0, "system": ""}
    assert decoding(Generate(), settings).model_dump(exclude_unset=True) == {"temperature": 0}
