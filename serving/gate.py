"""What happens to a request before it is read: host, key, place in the queue, size. Wraps the application of `app.py`.

A request keeps its place until its answer is sent. If its client disconnects, the application is cancelled, which ends
the work at the next token. A request is read as a whole before it goes on, so memory is bounded by places times size.
"""

import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.protocol import RefusalError

OPEN_PATH = "/health"  # needs no key
BODY_SECONDS = 60  # a client that sends its request more slowly loses its place
DRAIN_SECONDS = 5  # a refused client may go on sending this long; it would not read the reason before
LONGEST_RETRY = 60  # seconds
CLIENT_GONE = 499  # nginx's number for it; nobody receives it


@dataclass
class Limits:
    """Limits of a server.

    Attributes:
        key: the API key; None: none is needed.
        hosts: names under which the server may be addressed; None: any.
        queue: most requests that wait for the one that is answered.
        request_bytes: of the body of a request.
        pixels: of all photos of a request together.
    """

    key: str | None = None
    hosts: frozenset[str] | None = None
    queue: int = 16
    request_bytes: int = 64 * 2**20
    pixels: int = 128_000_000


def allowed_hosts(host: str, key: str | None) -> frozenset[str] | None:
    """Return names for `Limits.hosts`: those of this machine, if only it can connect and no key is asked for.

    Else a web page could lead its own name to 127.0.0.1 and so read, in the browser of a user, what the server answers.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return frozenset({"localhost", "127.0.0.1", "[::1]", host}) if local and key is None else None


class Queue:
    """Places of requests, and the turn of the one that is answered.

    Attributes:
        taken: places in use; the one that is answered has one too.
        turn: lock that is held while one is answered; first come, first served.
    """

    def __init__(self, limits: Limits) -> None:
        self.taken = 0
        self.turn = anyio.Lock()
        self._places = limits.queue + 1
        self._seconds = 1.0  # that the last request took

    @property
    def waiting(self) -> int:
        return self.taken - self.turn.locked()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place; raise RefusalError if there is none."""
        if self.taken >= self._places:
            retry_after = min(max(math.ceil(self._seconds), 1), LONGEST_RETRY)
            message = f"{self.taken} requests are answered or wait already, ask again later"
            raise RefusalError(429, message, code="queue_full", retry_after=retry_after)
        self.taken += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.taken -= 1
            self._seconds = time.monotonic() - start


class Gate:
    """ASGI middleware; see the module.

    Args:
        ended: is told the status and the seconds of each POST request; 499: the client was gone first.
    """

    def __init__(self, app: ASGIApp, limits: Limits, queue: Queue, ended: Callable[[int, float], None]) -> None:
        self._app, self._limits, self._queue, self._ended = app, limits, queue, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start, unread = CLIENT_GONE, time.monotonic(), True

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_headers(scope)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            with self._queue.place():
                unread = False
                body = await self._body(receive)
                if body is not None:
                    await self._answer(body, scope, receive, noting)
        except RefusalError as error:
            if unread:
                with anyio.move_on_after(DRAIN_SECONDS):
                    await _drain(receive)
            await refused(error)(scope, receive, noting)
        finally:
            if scope["method"] == "POST":
                self._ended(status, time.monotonic() - start)

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._limits.hosts is not None and _without_port(host) not in self._limits.hosts:
            raise RefusalError(403, "without a key, this server answers under the name of its own machine only")
        if self._limits.key is not None and scope["path"] != OPEN_PATH:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # compared in constant time, so that the time does not tell how much of a key is right
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._limits.key.encode()):
                message = "this server needs its API key: send the header Authorization: Bearer KEY"
                raise RefusalError(401, message, code="invalid_api_key")

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the whole body, and keep none that is too large; None: the client is gone."""
        most = self._limits.request_bytes
        body, too_large, more = bytearray(), False, True
        try:
            with anyio.fail_after(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    too_large = too_large or len(body) > most
                    if too_large:
                        body.clear()
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RefusalError(408, f"the request was not sent within {BODY_SECONDS} s", code="timeout") from error
        if too_large:
            message = f"a request has at most {most / 2**20:g} MiB here: send fewer or smaller photos"
            raise RefusalError(413, message, code="too_large")
        return bytes(body)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a request that was read, until it ends or the client is gone."""
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if not unread:
                await anyio.sleep_forever()  # the news that the client is gone are taken by `watch`
            return unread.pop()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await self._app(scope, replay, send)
            group.cancel_scope.cancel()


def refused(error: RefusalError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


async def _drain(receive: Receive) -> None:
    message = await receive()
    while message["type"] != "http.disconnect" and message.get("more_body", False):
        message = await receive()
