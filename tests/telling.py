"""A running server, and an engine that tells what it was sent; both need no model."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import openai
import uvicorn
from PIL import Image

from answering.request import CancelledError, Reply, ReplyStream
from config import Generate
from errors import UserError
from serving.app import Service, build_app
from serving.gate import Limits

NAME = "checkpoint-7"


def data_url(size=(4, 3), kind="PNG", colour="red"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def photo(url=None, **more):
    return {"type": "image_url", "image_url": {"url": url or data_url()} | more}


def words(text):
    return {"type": "text", "text": text}


def user(*content):
    return {"role": "user", "content": content[0] if content and isinstance(content[0], str) else list(content)}


class TellingStream(ReplyStream):
    """Notes that it is being closed, before it waits for the piece that is computed."""

    def __init__(self, pieces, closing):
        super().__init__(pieces)
        self.closing = closing

    def close(self):
        self.closing.set()
        super().close()


class TellingEngine:
    """Answers with the sizes of the photos and the texts it was sent; some questions make it fail or wait.

    Attributes:
        asked: messages and settings of each call.
        begun: number of pieces of the question "wait" that were begun.
        permits: each of them takes one, and waits until there is one.
        closing, closed: set when an answer is to end before its last piece, and when it has.
    """

    def __init__(self):
        self.asked = []
        self.begun, self.closing, self.closed = 0, threading.Event(), threading.Event()
        self.permits = threading.Semaphore(0)

    def stream(self, image, messages, settings):
        assert image is None
        self.asked.append((messages, settings))
        if not messages[-1]["content"]:
            raise UserError("the question is empty: type one")
        return TellingStream(self.pieces(messages), self.closing)

    def pieces(self, messages):
        question = messages[-1]["content"]
        if question == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if question == "defect":
            raise KeyError("secret")
        text = " | ".join(" ".join([*(str(p.size) for p in m.get("images", ())), m["content"]]) for m in messages)
        pieces = ["", text[:3], text[3:]] if question != "wait" else [f"{number} " for number in range(50)]
        told, reason = [], "length" if question == "long" else "stop"
        try:
            for piece in pieces:
                if question == "wait":
                    self.begun += 1
                    assert self.permits.acquire(timeout=60)
                told.append(piece)
                yield piece
                if question == "late" and piece:
                    raise UserError("the photo is broken")
        except CancelledError:
            reason = "cancelled"
            self.closed.set()
        return Reply("".join(told), reason, 11, len(told), tokens_reused=5, seconds_to_first_token=0.2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def listening(app):
    """Serve an ASGI app on a free port; gives the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(timeout=30)


@contextmanager
def running(engine, name=NAME, generate=None, **options):
    """Serve on a free port; gives the address. `options`: of `Limits`, and `files`."""
    files = options.pop("files", None)
    service = Service(engine, name, generate or Generate(), Limits(**options), files=files)
    with listening(build_app(service)) as address:
        yield address


def client_of(address, key="any", **options):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60, **options)


def ask(client, *messages, model=NAME, **fields):
    return client.chat.completions.create(model=model, messages=list(messages), **fields)
