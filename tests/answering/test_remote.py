"""A server in place of a model: what it is sent, what comes back, and one sentence for each way in which it fails."""

import json
import threading

import pytest
from PIL import Image

import predict
from answering import connection
from answering.connection import ServerGoneError
from answering.remote import AT_ONCE, RemoteAnswerer, server_config
from answering.request import Reply, Request
from config import Generate, changed
from errors import UserError
from tests.answering.scripted import WHOLE, delta, events, refusal, scripted, whole
from tests.telling import NAME, TellingEngine, running

RED = Image.new("RGB", (4, 3), "red")


@pytest.fixture(scope="module")
def engine():
    return TellingEngine()


@pytest.fixture(scope="module")
def address(engine):
    with running(engine) as address:
        yield address


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "红.jpg")
    return tmp_path / "红.jpg"


def test_a_dialogue_is_streamed(address, engine, photo):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?", "images": [photo, RED]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And?"},
    ]
    stream = RemoteAnswerer(address).stream(None, messages)
    assert list(stream) == ["Be ", "brief. | (30, 20) (4, 3) What? | A cat. | And?"]
    assert (stream.reply.text, stream.reply.finish_reason) == (
        "Be brief. | (30, 20) (4, 3) What? | A cat. | And?",
        "stop",
    )
    assert (stream.reply.tokens_in, stream.reply.tokens_out, stream.reply.tokens_reused) == (11, 3, 5)
    assert stream.reply.seconds_to_first_token > 0
    assert stream.reply.tokens_per_second > 0
    with pytest.raises(UserError, match="the question is empty"):
        RemoteAnswerer(address).stream(None, [{"role": "user", "content": " "}])


def test_requests_of_files_are_answered_in_their_order(address, photo):
    answerer = RemoteAnswerer(address)
    chat = answerer.chat
    requests = [
        Request([photo], [chat.question("<|extra_0|>\nWhat?", 1), chat.answer("A cat."), chat.question("long", 0)]),
        Request([], [chat.question("", 0)]),
        Request([RED, photo], [chat.question("Is <|extra_0|>\n<|extra_0|>\nred?", 2)]),
    ]
    first, refused, last = answerer.answer_many(requests)
    assert (first.text, first.finish_reason, first.tokens_in) == ("(30, 20) What? | A cat. | long", "length", 11)
    assert str(refused) == f"{address}/v1 refuses: the question is empty: type one"
    assert last.text == "(4, 3) (30, 20) Is \nred?"
    assert answerer.stream_messages(*requests[0]).rest() == first


def test_only_settings_that_were_set_are_sent(address, engine):
    def sent(own, given=None):
        list(RemoteAnswerer(address, settings=own).stream(None, [{"role": "user", "content": "?"}], given))
        got = engine.asked[-1][1].model_dump()
        return {name: value for name, value in got.items() if value != getattr(Generate(), name) and name != "seed"}

    assert sent(None) == {}
    settings = server_config({"generate.max_new_tokens": 9, "generate.top_k": 3, "generate.stop": ["a"]}).generate
    assert sent(settings) == {"max_new_tokens": 9, "top_k": 3, "stop": ("a",)}
    assert sent(settings, changed(settings, {"temperature": 0.5}, "")) == sent(settings) | {"temperature": 0.5}


def test_a_closed_stream_ends_the_work_of_the_server():
    engine = TellingEngine()
    with running(engine) as address:
        engine.permits.release(2)
        stream = RemoteAnswerer(address).stream(None, [{"role": "user", "content": "wait"}])
        assert next(stream) == "0 "
        stream.close()
        assert (stream.reply.text, stream.reply.finish_reason) == ("0 ", "cancelled")
        assert engine.closing.wait(60)
        engine.permits.release(2)
        assert engine.closed.wait(60)


def ask_stream(answerer):
    return "".join(answerer.stream(None, [{"role": "user", "content": "?"}]))


def ask_many(answerer):
    (reply,) = answerer.answer_many([Request([], [answerer.chat.question("?", 0)])])
    if isinstance(reply, UserError):
        raise reply
    return reply.text


def test_the_request_and_answers_of_other_servers():
    sent = events(delta(""), delta("ye\u2028"), delta("s"), delta(None, "stop"), "[DONE]", delta("!"))
    stream = ": comment\n\nevent: x\n" + sent.replace("\\u2028", "\u2028")  # the mark ends no line
    with scripted((200, {}, WHOLE), (200, {}, stream)) as (url, asked):
        answerer = RemoteAnswerer(f"{url}/other/v3/", "schlüssel", "gpt", Generate(temperature=0.5, min_p=0.0))
        assert ask_many(answerer) == "yes"
        assert ask_stream(answerer) == "ye\u2028s"
    path, headers, body = asked[0]
    assert path == "/other/v3/chat/completions"
    assert {name.lower(): value for name, value in headers.items()}["authorization"].startswith("Bearer schl")
    assert body == {"model": "gpt", "messages": [{"role": "user", "content": "?"}], "temperature": 0.5}
    assert asked[1][2] == body | {"stream": True, "stream_options": {"include_usage": True}}


BROKEN = [
    ((200, {}, "<html>hello"), "does not speak OpenAI's protocol, it says '<html>hello'", True),
    ((200, {}, "{}"), "does not speak OpenAI's protocol", True),
    ((200, {}, '{"choices": []}'), "does not speak OpenAI's protocol", True),
    ((200, {}, WHOLE[:-3], "cut"), "broke within an answer", True),
    ((500, {}, "<html>"), "answers with status 500 and no reason", True),
    ((307, {"Location": "http://example.com"}, ""), "answers with status 307 and no reason", True),
    ((401, {}, refusal("no such key")), "refuses the key (no such key): give the right --api-key", True),
    ((404, {}, refusal("no model gpt")), "refuses: no model gpt", True),
    ((429, {"Retry-After": "0"}, refusal("full")), "is busy (full): ask later", True),
    ((503, {}, refusal("out of memory")), "is busy (out of memory): ask later", True),
    ((400, {}, refusal("too long")), "refuses: too long", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "answer", "sentence", "gone"),
    [*((ask_many, *row) for row in BROKEN), *((ask_stream, *row) for row in BROKEN if row[0][0] != 200)],
)
def test_a_failing_server_gives_one_sentence(ask, answer, sentence, gone):
    with scripted(answer) as (url, _), pytest.raises(UserError) as caught:
        ask(RemoteAnswerer(url, model="gpt"))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith((url, f"the connection to {url}"))
    assert (type(caught.value) is ServerGoneError) == gone
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "cut", "sentence"),
    [
        (events(delta("abc")), [], "broke off after 3 characters"),
        (events(delta("abc")), ["cut"], "the connection to"),
        (events(delta("abc"), "{nothing"), [], "does not speak OpenAI's protocol, it says '{nothing'"),
        (events(delta("abc"), refusal("too hot")), [], "ended the answer: too hot"),
        ("<html>", [], "broke off after 0 characters"),
    ],
)
def test_a_stream_that_breaks_gives_one_sentence(content, cut, sentence):
    with scripted((200, {}, content, *cut)) as (url, _), pytest.raises(UserError, match=sentence):
        ask_stream(RemoteAnswerer(url, model="gpt"))


def test_a_busy_server_is_asked_again(monkeypatch):
    waits = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    busy, hour = (429, {"Retry-After": "7"}, refusal("full")), (503, {"Retry-After": "3600"}, refusal("full"))
    with scripted(busy, hour, (429, {}, ""), (200, {}, WHOLE)) as (url, asked):
        assert ask_many(RemoteAnswerer(url, model="gpt")) == "yes"
    assert waits == [7, connection.LONGEST_WAIT, 1]
    assert len(asked) == 4


def numbered(answerer, count, taken):
    for number in range(count):
        taken.append(number)
        yield Request([], [answerer.chat.question(str(number), 0)])


def test_several_requests_are_under_way_at_once_and_answers_keep_their_order():
    everyone, last = threading.Barrier(AT_ONCE, timeout=60), threading.Event()
    inside, most = set(), []

    def answer(body):
        question = body["messages"][-1]["content"]
        inside.add(question)
        most.append(len(inside))
        everyone.wait()  # so none is answered before as many have come
        if question == str(AT_ONCE - 1):
            last.set()
        assert question != "0" or last.wait(60)  # the first is answered last
        inside.discard(question)
        return (400, {}, refusal("never")) if question in ("1", "9") else (200, {}, whole(f"of {question}"))

    taken = []
    with scripted(answer) as (url, asked):
        answerer = RemoteAnswerer(url, model="gpt")
        replies = answerer.answer_many(numbered(answerer, 2 * AT_ONCE, taken))
        found = [next(replies)]
        assert taken == list(range(AT_ONCE))  # it takes no more requests than it asks
        found += replies
    wanted = [f"of {number}" for number in range(2 * AT_ONCE)]
    wanted[1] = wanted[9] = f"{url}/v1 refuses: never"
    assert [reply.text if isinstance(reply, Reply) else str(reply) for reply in found] == wanted
    assert len(asked) == 2 * AT_ONCE
    assert max(most) == AT_ONCE


def test_a_server_without_room_for_several_is_asked_one_by_one(monkeypatch):
    engine = TellingEngine()
    # the first answer holds the only place, and ends when another request has been refused
    monkeypatch.setattr(connection.time, "sleep", lambda _: engine.permits.release(50))
    with running(engine, queue=0) as address:
        answerer = RemoteAnswerer(address)
        requests = [Request([], [answerer.chat.question("wait", 0)]), *numbered(answerer, 2 * AT_ONCE, [])]
        replies = list(answerer.answer_many(requests))
    assert [reply.text for reply in replies[1:]] == [str(number) for number in range(2 * AT_ONCE)]
    assert replies[0].text.startswith("0 1 2 ")


def test_a_broken_photo_is_an_error_of_its_row(address, photo, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    answerer = RemoteAnswerer(address)
    question = answerer.chat.question("<|extra_0|>\nWhat?", 1)
    requests = [Request([file], [question]) for file in (photo, tmp_path / "text.jpg", photo)]
    first, broken, last = answerer.answer_many(requests)
    assert "text.jpg: not an image" in str(broken)
    assert first.text == last.text == "(30, 20) What?"


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_one_of_several_models_must_be_named(names):
    message = f"has {len(names)} models, name one with --model: {', '.join(names)}"
    with (
        scripted((200, {}, json.dumps({"data": [{"id": name} for name in names]}))) as (url, asked),
        pytest.raises(UserError, match=message),
    ):
        RemoteAnswerer(url)
    assert asked[0][0] == "/v1/models"


def test_no_server_and_no_url(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with scripted((200, {}, "")) as (url, _):
        pass
    with pytest.raises(ServerGoneError, match=f"no answer from {url}/v1 .*: start the server, or correct --server"):
        RemoteAnswerer(url)
    with scripted((200, {}, '{"data": [{"id": "one"}]}')) as (url, _):
        assert RemoteAnswerer(url).name == "one"  # a proxy is not asked for this machine
    wrongs = "127.0.0.1:8000 ftp://x http:// http://x:y http://x/v1?y http://[::1 http://[::1]x http://u:key@x u:key@x"
    for wrong in ["", *wrongs.split()]:
        with pytest.raises(UserError, match="--server: .* is not a URL such as|^--server: a URL with a name [^@]*$"):
            RemoteAnswerer(wrong)


def test_what_is_the_servers_matter_cannot_be_set():
    for key in ("llm.path", "visual.tiles", "data.seed", "gui.port"):
        with pytest.raises(UserError, match=rf"'{key}' is the server's matter: with --server, only generate\.\* can"):
            server_config({key: 1})
    with pytest.raises(UserError, match=r"unknown key 'generate\.tempratur', did you mean 'generate\.temperature'"):
        server_config({"generate.tempratur": 1})
    with pytest.raises(UserError, match="generate"):
        server_config({"generate": 1})
    assert server_config({"data.seed": 3, "gui.port": 80}, "data", "gui").data.seed == 3


def test_predict_asks_a_server(address, photo, capsys):
    options = ["--server", address, "--model", NAME, "generate.max_new_tokens=5"]
    predict.main([*options, "--image", str(photo), "--image", str(photo), "--question", "What?"])
    assert capsys.readouterr().out == "(30, 20) (30, 20) What?\n"
    rows = [{"image": photo.name, "question": "What?"}, {"image": "missing.jpg", "question": "?"}, {"question": "Hi"}]
    source, target = photo.parent / "in.jsonl", photo.parent / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match="1 of 3 rows could not be answered"):
        predict.main([*options, "--input", str(source), "--output", str(target)])
    answered = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row.get("answer") for row in answered] == ["(30, 20) What?", None, "Hi"]


def test_a_server_that_goes_ends_the_file_at_once(photo, capsys):
    source, target = photo.parent / "in.jsonl", photo.parent / "out.jsonl"
    source.write_text('{"question": "1"}\n{"question": "2"}\n{"question": "3"}\n')

    def answer(body):
        first = body["messages"][-1]["content"] == "1"
        return (200, {}, WHOLE) if first else (401, {}, refusal("expired"))

    with (
        scripted(answer) as (url, _),
        pytest.raises(ServerGoneError, match="refuses the key .expired."),
    ):
        predict.main(["--server", url, "--model", "m", "--input", str(source), "--output", str(target)])
    assert [json.loads(line) for line in target.read_text().splitlines()] == [{"question": "1", "answer": "yes"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --checkpoint DIR, or --server URL"),
        (["--checkpoint", "c", "--server", "http://x"], "give either --checkpoint DIR, or --server URL"),
        (["--checkpoint", "c", "--model", "m"], "--model and --api-key belong to --server"),
        (["--checkpoint", "c", "--api-key", "k"], "--model and --api-key belong to --server"),
        (["--server", "http://x", "--api-key", ""], "--api-key is empty"),
        (["--server", "http://x", "llm.path=x"], "'llm.path' is the server's matter"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        predict.main([*options, "--question", "?"])


def test_the_key_may_come_from_the_environment(monkeypatch, engine, capsys):
    with running(engine, key="secret") as address:
        with pytest.raises(ServerGoneError, match="refuses the key"):
            predict.main(["--server", address, "--question", "?"])
        monkeypatch.setenv("VQA_API_KEY", "secret")
        predict.main(["--server", address, "--question", "Hi"])
        assert capsys.readouterr().out == "Hi\n"
        with pytest.raises(ServerGoneError, match="refuses the key"):
            predict.main(["--server", address, "--question", "?", "--api-key", "other"])
