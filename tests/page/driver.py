"""What the tests of the page share: an engine that tells what it was sent, a served page, and a browser's moves."""

import contextlib
import threading
import time

import httpx2
import pytest

from answering.request import CancelledError, Reply, ReplyStream
from config import Generate, Gui, Prompt
from errors import UserError
from evaluation import screenshots
from page.address import in_url
from page.checkpoints import Engines
from qwen.chat import MessageFormat
from tests.telling import free_port, listening
from visual_plan import VisualPlan

THUMBNAILS = "#question .thumbnail-wrapper"
PATIENCE = 120_000  # ms: other tests may have the machine, and the first page of a browser loads slowly


class SpokenEngine:
    """Answers with the photos' sizes and the questions it was sent; some questions make it fail or slow.

    Attributes:
        settings: of the last question.
        messages: of the last question.
        at_work: questions that are answered now; two at once are an error.
        go_on: "wait" is answered when it is set.
    """

    chat = MessageFormat(Prompt(), VisualPlan(1))

    def __init__(self):
        self.settings, self.messages = None, None
        self.closed_early = False
        self.at_work = 0
        self.go_on = threading.Event()

    def stream(self, image, messages, settings):
        assert image is None
        self.settings, self.messages = settings, messages
        return ReplyStream(self._pieces(messages))

    def _pieces(self, messages):
        question, told, reason = messages[-1]["content"], [], "stop"
        if question == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if question == "long":
            raise UserError("the dialogue is <b>too long</b>: start a new one")
        if question == "defect":
            raise KeyError("something of ours")
        self.at_work += 1
        assert self.at_work == 1, "two at once"
        try:
            if question == "silent":
                time.sleep(3)
            if question == "wait":
                self.go_on.wait(60)
            asked = [message for message in messages if message["role"] == "user"]
            pieces = [" + ".join(" ".join([*(str(p.size) for p in m["images"]), m["content"]]) for m in asked)]
            if question == "slow":
                pieces += [" on"] * 400
            if question == "nothing":
                pieces = []
            for piece in pieces:
                told.append(piece)
                yield piece
                if question == "slow":
                    time.sleep(0.05)
        except CancelledError:
            reason, self.closed_early = "cancelled", True
        finally:
            self.at_work -= 1
        return Reply("".join(told), reason, 30, len(told), 11, 0.25, 8.5)

    def answer_many(self, requests, settings=None):
        self.settings = settings
        for request in requests:
            text = "".join(part for part in request.messages[-1].parts if isinstance(part, str)).strip()
            if text == "wait":
                self.go_on.wait(60)
            yield Reply(f"{len(request.photos)} {text}", "stop", 1, 1)


@contextlib.contextmanager
def served(folder, engines=None, generate=None, samples=None, **gui):
    """Serve a page with uploads in `folder`; gives its address without the last slash."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    patch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there: the page must not need a proxy
    patch.setenv("no_proxy", "")  # `launch` changes both
    patch.setenv("NO_PROXY", "")
    from page.build import build_page, launch

    folder.mkdir(exist_ok=True)
    settings = Gui(**({"port": free_port()} | gui))
    page = build_page(engines or Engines(SpokenEngine(), "checkpoint-7"), generate or Generate(), folder, samples)
    launch(page, settings)
    try:
        yield f"http://{in_url(settings.host)}:{settings.port}"
    finally:
        page.close()
        patch.undo()


@contextlib.contextmanager
def opened(browser, address, language="en", width=1280, path="/", **options):
    """Open a page in a context of its own; afterwards it must have asked only its own server, and run no text."""
    context = browser.new_context(locale={"en": "en-GB", "zh": "zh-CN"}.get(language, language),
                                  viewport={"width": width, "height": 800}, **options)  # fmt: skip
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    requests, dialogs = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address + path)
    page.wait_for_selector("#ask")
    try:
        yield page
    finally:
        context.close()
    assert len(requests) > 5
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert dialogs == []


def expect(page, selector):
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(page.locator(selector))


def expect_text(page, selector, text):
    expect(page, selector).to_contain_text(text)


def wait_until(holds):
    """Wait for what the page does not show: a function of no arguments, asked every 50 ms."""
    end = time.monotonic() + PATIENCE / 1000
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    assert holds()


def upload(page, *files):
    """Attach files to the question, as a user does; wait for their pictures."""
    before = page.locator(THUMBNAILS).count()
    with page.expect_file_chooser() as chooser:  # without it, a file that was chosen before would not be seen again
        page.click("#question .upload-button")
    chooser.value.set_files([str(file) for file in files])
    expect(page, THUMBNAILS).to_have_count(before + len(files))


def ask(page, question):
    page.fill("#question textarea", question)
    page.click("#ask")


def fresh(page):
    """End what runs, and begin a new chat with an empty question box."""
    page.evaluate("document.querySelector('#stop').click()")  # nothing happens if it is disabled
    expect(page, "#ask").to_be_enabled()
    while page.locator(f"{THUMBNAILS} button").count():
        page.locator(f"{THUMBNAILS} button").first.click()
    page.fill("#question textarea", "")
    page.click("#clear")
    expect(page, "#chat .message").to_have_count(0)


@contextlib.contextmanager
def proxied(address, prefix="/vqa"):
    """Offer what `address` serves at a path of another server, as nginx does; gives the other server's address."""

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        assert scope["path"].startswith(prefix)  # also ends a mistake in which the proxy asks itself
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        inside = scope["path"].removeprefix(prefix) or "/"
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        async with (
            httpx2.AsyncClient(trust_env=False, timeout=60) as client,
            client.stream(scope["method"], address + inside + query, headers=scope["headers"], content=body) as answer,
        ):
            headers = [(name, value) for name, value in answer.headers.raw if name.lower() != b"transfer-encoding"]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    with listening(app) as outside:  # not `address`, which `app` asks
        yield outside


def no_browser():
    import shutil

    return not any(map(shutil.which, screenshots.BROWSERS))
