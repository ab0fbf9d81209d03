"""OpenAI's own client asks a real server whose engine tells what it was sent."""

import json
import socket
import threading
import time
import urllib.request

import httpx2
import openai
import pytest

from config import Generate
from serving import gate
from tests.telling import (
    NAME,
    TellingEngine,
    ask,
    client_of,
    data_url,
    photo,
    running,
    user,
    words,
)  # fmt: skip


def test_photos_texts_and_roles_reach_the_engine(client, engine):
    answer = ask(
        client,
        {"role": "system", "content": "Be brief."},
        user(words("What"), photo(data_url((6, 5))), words("is it?"), photo(data_url((7, 5), "JPEG"))),
        {"role": "assistant", "content": [words("A"), words("cat.")]},
        user("And?"),
    )
    assert answer.choices[0].message.content == "Be brief. | (6, 5) (7, 5) What\nis it? | A\ncat. | And?"
    assert [message["role"] for message in engine.asked[-1][0]] == ["system", "user", "assistant", "user"]
    assert (answer.model, answer.object, answer.choices[0].finish_reason) == (NAME, "chat.completion", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 3, 14)
    assert answer.usage.prompt_tokens_details.cached_tokens == 5


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client):
    first = ask(client, user("One?")).choices[0].message
    assert ask(client, user("One?"), first, user("Two?")).choices[0].message.content == "One? | One? | Two?"
    whole = first.model_dump()  # with the fields that are empty
    assert ask(client, user("One?"), whole, user("Two?")).choices[0].message.content == "One? | One? | Two?"


def test_a_stream_has_the_pieces_then_the_reason_then_the_usage(client):
    chunks = list(ask(client, user(photo(), words("long?")), stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].delta.content for piece in pieces] == ["", "(4,", " 3) long?"]
    assert [chunk.choices[0].finish_reason for chunk in [*pieces, last]] == [None] * 3 + ["stop"]
    assert (usage.choices, usage.usage.prompt_tokens, usage.usage.completion_tokens) == ([], 11, 3)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in [*pieces, last])
    assert ask(client, user("long")).choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in ask(client, user("long"), stream=True)][-1] == "length"


def test_decoding_settings_reach_the_engine(client, engine):
    own = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5}
    neutral = {"frequency_penalty": 0, "n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
    ask(client, user("?"), temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop="a", extra_body=own | neutral)
    assert engine.asked[-1][1] == Generate(temperature=0.5, top_p=0.9, max_new_tokens=7, seed=3, stop=("a",), **own)
    ask(client, user("?"), stop=["a", "b"])
    assert engine.asked[-1][1].stop == ("a", "b")
    ask(client, user("?"), max_completion_tokens=9)
    assert (engine.asked[-1][1].max_new_tokens, engine.asked[-1][1].temperature) == (9, 0)
    seeds = set()
    for _ in range(3):
        ask(client, user("?"), temperature=1)
        seeds.add(engine.asked[-1][1].seed)
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"guided_json": {}}, "guided_json"),
        ({"stream_options": {"other": True}}, "stream_options.other"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, "messages.0.role"),
        ({"messages": [user("?"), user("?")]}, "messages.1.role"),
        ({"messages": [user("?"), {"role": "system", "content": "?"}]}, "messages.1.role"),
        ({"messages": [user("?"), {"role": "assistant", "content": "?"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "?"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [user("?") | {"name": "me"}]}, "messages.0.name"),
        ({"messages": [user(words("?"), photo(detail="high"))]}, "messages.0.content.1.image_url.detail"),
        ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, "messages.0.content.0"),
        ({"messages": [user("a" * 1_000_001)]}, "messages"),
        ({"messages": [user(*[photo()] * 257)]}, "messages"),
        ({"messages": [user("\ud800")]}, "messages.0.content"),
        ({"\ud800": 1}, None),
        ({"stop": "\ud800"}, "stop"),
        ({"messages": [user("")]}, None),
    ],
)
def test_what_is_not_done_is_refused_by_name(address, engine, fields, param):
    """Not by the client, which would check some of it itself."""
    before = len(engine.asked)
    body = {"model": NAME, "messages": [user("?")]} | fields
    response = httpx2.post(f"{address}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) < 400
    assert len(engine.asked) == before + (fields == {"messages": [user("")]})


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"[]", JSON),
        (b"\xff", JSON),
        (b"[" * 100_000, JSON),
        (b'{"model": NaN}', JSON),
        (json.dumps({"model": NAME, "messages": [user("?")]}).encode(), {"content-type": "text/plain"}),
    ],
)
def test_garbage_is_refused_in_openais_shape(address, content, headers):
    response = httpx2.post(f"{address}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_another_model_and_another_path_are_not_found(client, address):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here: 'checkpoint-7' is") as caught:
        ask(client, user("?"), model="gpt")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert [model.id for model in client.models.list()] == [NAME]
    assert httpx2.get(f"{address}/v1/other").json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{address}/docs").status_code == 404  # it would load scripts from another server
    refused = httpx2.get(f"{address}/v1/chat/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_errors_of_the_engine_have_a_status_and_no_traceback(client):
    with pytest.raises(openai.BadRequestError, match="the question is empty"):
        ask(client, user(""))
    with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
        ask(client, user("memory"))
    assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
    for options in ({}, {"stream": True}):  # the first piece comes before the status is sent
        with pytest.raises(openai.InternalServerError, match="a defect of this server") as caught:
            ask(client, user("defect"), **options)
        assert caught.value.status_code == 500
        assert "secret" not in str(caught.value)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(client):
    pieces = []
    with pytest.raises(openai.APIError, match="the photo is broken"):
        pieces.extend(ask(client, user("late"), stream=True))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == "lat"


def test_a_key_is_asked_for_everywhere_but_at_health(engine):
    with running(engine, key="schlüssel") as address:
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(client_of(address, "wrong"), user("?"))
        assert caught.value.code == "invalid_api_key"
        assert httpx2.get(f"{address}/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert httpx2.get(address + path).status_code == 401
        right = {"authorization": "Bearer schlüssel".encode()}
        assert httpx2.get(f"{address}/v1/models", headers=right).status_code == 200
        assert httpx2.get(f"{address}/v1/models", headers={"authorization": "schlüssel".encode()}).status_code == 401


def test_a_web_page_cannot_lead_its_own_name_here(engine):
    hosts = gate.allowed_hosts("127.0.0.1", None)
    with running(engine, hosts=hosts) as address:
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", f"localhost:{port}", f"[::1]:{port}"):
            assert httpx2.get(f"{address}/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
            assert httpx2.get(f"{address}/v1/models", headers={"host": host}).status_code == 403
    assert gate.allowed_hosts("127.0.0.1", "key") is None
    assert gate.allowed_hosts("0.0.0.0", None) is None


def metrics_of(address):
    lines = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it does not happen")


def in_thread(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


class Waiting:
    """A request on a bare connection, which can be cut."""

    def __init__(self, address, question, missing=0):
        """`missing`: bytes that are announced and never sent."""
        body = json.dumps({"model": NAME, "messages": [user(question)]}).encode()
        host, _, port = address.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body) + missing}\r\n\r\n".encode() + body)

    def cut(self):
        self.socket.close()


def one_and_one_waiting(engine, address):
    """A client whose request is answered, and one that waits behind it."""
    first = Waiting(address, "wait")
    until(lambda: engine.begun == 1)
    second = Waiting(address, "second")
    until(lambda: metrics_of(address)["vqa_waiting"] == 1)
    return first, second


def test_one_is_answered_one_waits_the_next_is_refused():
    engine = TellingEngine()
    with running(engine, queue=1) as address, client_of(address) as client:
        first, second = one_and_one_waiting(engine, address)
        assert metrics_of(address)["vqa_running"] == 1
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, user(photo(data_url((900, 900), "BMP"))))  # 3 MB, which are read before the refusal
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= gate.LONGEST_RETRY
        assert len(engine.asked) == 1
        engine.permits.release(50)
        assert b"200 OK" in first.socket.recv(100)
        assert b"200 OK" in second.socket.recv(100)
        assert ask(client, user("third")).choices[0].message.content == "third"
        measured = metrics_of(address)
        assert (measured["vqa_waiting"], measured["vqa_running"]) == (0, 0)
        assert measured['vqa_responses_total{status="200"}'] == 3
        assert measured['vqa_responses_total{status="429"}'] == 1
        assert measured["vqa_answer_tokens_total"] == 50 + 3 + 3
        assert measured["vqa_cached_tokens_total"] == 3 * 5
        assert measured["vqa_request_seconds_count"] == 4
        assert measured['vqa_first_token_seconds_bucket{le="0.1"}'] == 0
        assert measured['vqa_first_token_seconds_bucket{le="0.25"}'] == 3
        for each in (first, second):
            each.cut()


@pytest.mark.parametrize("how", ["stream", "whole"])
def test_a_client_that_is_gone_ends_the_work_within_a_token(how):
    engine = TellingEngine()
    with running(engine, queue=1) as address, client_of(address) as client:
        if how == "stream":
            engine.permits.release(2)
            answer = ask(client, user("wait"), stream=True)
            next(answer)
            until(lambda: engine.begun == 3)
            answer.close()
        else:
            waiting = Waiting(address, "wait")
            until(lambda: engine.begun == 1)
            waiting.cut()
        until(lambda: metrics_of(address)["vqa_running"] == 1)  # a token is being computed
        assert not engine.closed.is_set()
        assert engine.closing.wait(60)
        before = engine.begun
        engine.permits.release(50)
        assert engine.closed.wait(60)
        assert engine.begun == before
        assert ask(client, user("next")).choices[0].message.content == "next"


def test_a_client_that_is_gone_while_it_waits_frees_its_place():
    engine = TellingEngine()
    with running(engine, queue=1) as address, client_of(address) as client:
        first, second = one_and_one_waiting(engine, address)
        second.cut()
        until(lambda: metrics_of(address)["vqa_waiting"] == 0)
        third, answers = in_thread(ask, client, user("third"))
        until(lambda: metrics_of(address)["vqa_waiting"] == 1)
        engine.permits.release(50)
        third.join(60)
        assert answers[0].choices[0].message.content == "third"
        assert [messages[-1]["content"] for messages, _ in engine.asked] == ["wait", "third"]
        first.cut()


def test_large_and_slow_requests_are_refused(engine, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    with running(engine, request_bytes=2**20, queue=0) as address:
        with client_of(address) as client, pytest.raises(openai.APIStatusError, match="at most 1 MiB") as caught:
            ask(client, user("a" * 5_000_000))
        assert caught.value.status_code == 413
        slow = Waiting(address, "?", missing=1)
        answer = slow.socket.recv(10_000)
        assert b"408" in answer
        with client_of(address) as client:
            assert ask(client, user("after")).choices[0].message.content == "after"
        slow.cut()
