"""The clients of `benchmarks/soak.py`: what each asks, and what it must get."""

import base64
import collections
import contextlib
import io
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import httpx2
from gradio_client.exceptions import AppError
from PIL import Image

from answering.remote import data_url

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
DESCRIBE, COUNT = "What is in the picture?", "How many objects are there?"
QUESTIONS = ("describe", "count", "two photos", "shared photo", "dialogue")
# how often each kind is asked in 25 requests
KINDS = {
    "whole": 5, "stream": 5, "models": 1, "gone": 2, "garbage": 3,
    "page answer": 3, "page chat": 2, "page cancel": 1, "page leave": 1, "page garbage": 2,
}  # fmt: skip
PATIENCE = 600  # seconds; who waits longer hangs
LONGEST_STAY = 3.0  # seconds until a client leaves in the middle
BUSY = "An answer is being written"  # the page's sentence to a session whose cancelled answer has not ended yet
PAGE_SETTINGS = ["", "checkpoint", False, 0, 1, 0, 0, 1, 0, 256, ""]  # box, checkpoint, panel of `page/settings.py`


def about(url: str) -> dict[str, Any]:
    """Return the field of a request that asks about a photo with this address."""
    photo = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [photo, {"type": "text", "text": DESCRIBE}]}]}


def black(side: int) -> bytes:
    """Return a PNG of few bytes and many pixels."""
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def encoded(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# name → method and content; a dict replaces fields of a sound request
GARBAGE: dict[str, tuple[str, bytes | dict[str, Any]]] = {
    "broken JSON": ("POST", b'{"model": '),
    "no UTF-8": ("POST", b"\xff"),
    "nested brackets": ("POST", b"[" * 100_000),
    "broken photo": ("POST", about(encoded(b"no photo"))),
    "cut photo": ("POST", about(encoded(black(64)[:50]))),
    "broken base64": ("POST", about("data:image/png;base64,!")),
    "too many pixels": ("POST", about(encoded(black(4000)))),
    "address of the network": ("POST", about("http://127.0.0.1/x.png")),
    "too large": ("POST", about(encoded(bytes(3 * 2**20)))),
    "wrong roles": ("POST", {"messages": [{"role": "assistant", "content": "?"}]}),
    "no messages": ("POST", {"messages": []}),
    "unknown field": ("POST", {"guided_json": {}}),
    "wrong type": ("POST", {"temperature": "hot"}),
    "unknown model": ("POST", {"model": "gpt"}),
    "wrong method": ("DELETE", b""),
}
# name → arguments of /answer after the photo
PAGE_GARBAGE: dict[str, tuple[Any, ...]] = {
    "no question": (" ",),
    "unknown checkpoint": (DESCRIBE, "other"),
    "odd length": (DESCRIBE, "checkpoint", -1),
    "odd temperature": (DESCRIBE, "checkpoint", 0, "hot"),
    "question is a list": ([],),
}
FORM = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n%b\r\n--b--\r\n'
IN_PARTS = {"content-type": "multipart/form-data; boundary=b"}
# name → method, path, headers and content of a bare request
PAGE_RAW: dict[str, tuple[str, str, dict[str, str], bytes]] = {
    "broken JSON": ("POST", "call/answer", JSON, b"{"),
    "other endpoint": ("POST", "call/other", JSON, b'{"data": []}'),
    "wrong method": ("DELETE", "call/answer", {}, b""),
    "no form": ("POST", "upload", JSON, b"{}"),
    "too large": ("POST", "upload", IN_PARTS, FORM % bytes(2**21)),
}


class UnexpectedError(Exception):
    """A reply that no request of this kind may get."""


@dataclass
class SoakTally:
    """What happened to all clients.

    Attributes:
        answers: right ones by kind, and requests that were left, by kind.
        refusals: by garbage and status.
        busy: refusals of sound requests, which were sent again.
        wrong: answers other than the one that was given alone.
        leaks: those of them that describe the photo of another client.
        seconds: of each request, with its kind.
    """

    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    busy: int = 0
    wrong: int = 0
    leaks: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Services:
    """What all clients share.

    Attributes:
        http: client of `serve.py`.
        page: address of the page.
        shared: a photo that all clients have.
        descriptions: expected descriptions of the clients' photos.
    """

    http: httpx2.Client
    page: str
    model: str
    shared: Path
    tally: SoakTally = field(default_factory=SoakTally)
    descriptions: list[str] = field(default_factory=list)


class Session:
    """A client.

    Args:
        files: two photos of its own.

    Attributes:
        expected: answers that were given alone, by question.
    """

    def __init__(self, services: Services, files: list[Path], choose: random.Random) -> None:
        self.services, self.files, self.choose = services, files, choose
        self.expected: dict[str, str] = {}
        self.page = self.new_page()

    def new_page(self) -> gradio_client.Client:
        return gradio_client.Client(self.services.page, verbose=False, analytics_enabled=False, download_files=False)

    def request(self, kind: str) -> None:
        """Make one request of a kind; note whatever must not happen."""
        began, tally = time.monotonic(), self.services.tally
        try:
            getattr(self, kind.replace(" ", "_"))(kind)
        except (httpx.HTTPError, httpx2.HTTPError, AppError, TimeoutError, UnexpectedError) as error:
            with tally.lock:
                tally.problems.append(f"{kind}: {type(error).__name__}: {error}"[:500])
        with tally.lock:
            tally.seconds.append((time.monotonic() - began, kind))

    def answered(self, kind: str, name: str = "", text: str = "") -> None:
        """Count an answer, and compare that to a question of `QUESTIONS` with the one that was given alone."""
        with self.services.tally.lock:
            if text == self.expected.get(name, ""):
                self.services.tally.answers[kind] += 1
                return
            self.services.tally.wrong += 1
            self.services.tally.leaks += text != self.expected["describe"] and text in self.services.descriptions
        raise UnexpectedError(f"{name}: expected {self.expected[name]!r}, found {text!r}")

    def refused(self, name: str, status: int, sentence: str) -> None:
        with self.services.tally.lock:
            self.services.tally.refusals[f"{name}: {status}"] += 1
        if not 400 <= status < 500 or not sentence or "Traceback" in sentence:
            raise UnexpectedError(f"{name}: {status} {sentence}")

    def photos(self, name: str) -> list[Path]:
        return {"two photos": self.files, "shared photo": [self.services.shared]}.get(name, self.files[:1])

    def body(self, name: str) -> dict[str, Any]:
        """Return the request that asks a question of `QUESTIONS`."""
        photos = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in self.photos(name)]
        text = {"type": "text", "text": self.text(name)}
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*photos, text]}]
        if name == "dialogue":
            messages.append({"role": "assistant", "content": self.expected["describe"]})
            messages.append({"role": "user", "content": COUNT})
        return {"model": self.services.model, "messages": messages}

    def text(self, name: str) -> str:
        return COUNT if name in ("count", "two photos") else DESCRIBE

    def when_free(self, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Ask the server, again while it is busy."""
        for _ in range(PATIENCE):
            response = ask()
            if response.status_code == 200:
                return response
            if response.status_code != 429 or "ask again later" not in response.json()["error"]["message"]:
                raise UnexpectedError(f"{response.status_code} {response.text}")
            with self.services.tally.lock:
                self.services.tally.busy += 1
            time.sleep(float(response.headers["retry-after"]))
        raise TimeoutError("the server stays busy")

    def ask(self, name: str) -> str:
        """Return the answer to a question of `QUESTIONS`."""
        response = self.when_free(lambda: self.services.http.post(CHAT, json=self.body(name)))
        return response.json()["choices"][0]["message"]["content"]

    def whole(self, kind: str) -> None:
        name = self.choose.choice(QUESTIONS)
        self.answered(kind, name, self.ask(name))

    def stream(self, kind: str) -> None:
        name = self.choose.choice(QUESTIONS)

        def ask() -> httpx2.Response:
            with self.services.http.stream("POST", CHAT, json=self.body(name) | {"stream": True}) as response:
                response.read()
            return response

        events = [line.removeprefix("data: ") for line in self.when_free(ask).text.split("\n\n") if line]
        if events[-1] != "[DONE]":
            raise UnexpectedError(f"the last event is {events[-1]}")
        chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
        if chunks[-1]["finish_reason"] != "stop":
            raise UnexpectedError(f"the last chunk is {chunks[-1]}")
        self.answered(kind, name, "".join(chunk["delta"].get("content", "") for chunk in chunks))

    def models(self, kind: str) -> None:
        names = [model["id"] for model in self.services.http.get("/v1/models").json()["data"]]
        if names != [self.services.model]:
            raise UnexpectedError(f"{names}")
        self.answered(kind)

    def gone(self, kind: str) -> None:
        """Leave while the request waits, or in the middle of the answer."""
        events = self.choose.randrange(8)
        patience = PATIENCE if events else self.choose.uniform(0.1, LONGEST_STAY)
        body = self.body("describe") | {"stream": True}
        with (
            contextlib.suppress(httpx2.ReadTimeout),
            self.services.http.stream(
                "POST", CHAT, json=body, timeout=httpx2.Timeout(PATIENCE, read=patience)
            ) as response,
        ):
            for _ in zip(range(events), response.iter_lines(), strict=False):
                pass
        self.answered(kind)

    def garbage(self, kind: str) -> None:
        name = self.choose.choice(list(GARBAGE))
        method, content = GARBAGE[name]
        if isinstance(content, dict):
            content = json.dumps(self.body("describe") | content).encode()
        response = self.services.http.request(method, CHAT, content=content, headers=JSON)
        if response.status_code == 429:
            return self.garbage(kind)
        return self.refused(name, response.status_code, response.json().get("error", {}).get("message", ""))

    def page_alone(self, kind: str) -> None:
        """Ask the page everything once: it must answer as the server does."""
        for name in QUESTIONS[:-1]:
            self.page_asked(kind, name)
        self.page_chat(kind)

    def page_answer(self, kind: str) -> None:
        self.page_asked(kind, self.choose.choice(QUESTIONS[:-1]))

    def page_asked(self, kind: str, name: str) -> None:
        files = [gradio_client.handle_file(file) for file in self.photos(name)]
        for _ in range(PATIENCE):
            job = self.page.submit(files, self.text(name), "checkpoint", 0, 0, "", api_name="/answer")
            try:
                return self.answered(kind, name, job.result(PATIENCE))
            except CancelledError:  # by gradio_client itself, where its stream ends with the job before
                pass
            except AppError as error:
                if not str(error).startswith(BUSY):
                    raise
            time.sleep(1)
        raise TimeoutError("the page stays busy")

    def page_chat(self, kind: str) -> None:
        """Begin a chat, and ask on."""
        self.answered(kind, "describe", self.said(DESCRIBE, self.files[:1]))
        self.answered(kind, "dialogue", self.said(COUNT, []))

    def said(self, text: str, files: list[Path]) -> str:
        """Ask in the page's chat, again while a cancelled answer of this session ends; return the answer."""
        for _ in range(PATIENCE):
            with contextlib.suppress(CancelledError):  # as in `page_asked`
                shown, status, *_ = self.submit(text, files).result(PATIENCE)
                if not status.startswith(BUSY):
                    return shown[-1]["content"][-1]["text"]
            time.sleep(1)
        raise TimeoutError("the page stays busy")

    def submit(self, text: str, files: list[Path]) -> gradio_client.client.Job:
        payload = {"text": text, "files": [gradio_client.handle_file(file) for file in files]}
        return self.page.submit(payload, "new", -1, *PAGE_SETTINGS, api_name="/on_ask")

    def page_cancel(self, kind: str) -> None:
        job = self.submit(DESCRIBE, self.files[:1])
        time.sleep(self.choose.uniform(0, LONGEST_STAY))
        job.cancel()
        self.answered(kind)

    def page_leave(self, kind: str) -> None:
        """Close the session in the middle of an answer, and begin another."""
        job = self.submit(DESCRIBE, self.files[:1])
        while not job.outputs() and not job.done():  # its photo is still on the way
            time.sleep(0.1)
        time.sleep(self.choose.uniform(0, LONGEST_STAY))
        self.page.close()
        self.page = self.new_page()
        self.answered(kind)

    def page_garbage(self, kind: str) -> None:
        name = self.choose.choice([*PAGE_GARBAGE, *PAGE_RAW])
        if name in PAGE_RAW:
            method, path, headers, content = PAGE_RAW[name]
            address = f"{self.services.page}gradio_api/{path}"
            response = self.services.http.request(method, address, headers=headers, content=content)
            return self.refused(f"page: {name}", response.status_code, response.text)
        try:
            self.page.predict([gradio_client.handle_file(self.files[0])], *PAGE_GARBAGE[name], api_name="/answer")
        except AppError as error:
            return self.refused(f"page: {name}", 400, str(error))
        raise UnexpectedError(f"{name} was answered")
