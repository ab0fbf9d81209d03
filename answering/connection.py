"""Requests to a server that speaks OpenAI's protocol; whatever goes wrong becomes one sentence. Used by `remote.py`.

The client is httpx2, which huggingface_hub brings; OpenAI's own would be one more package for one POST request.
"""

import contextlib
import ipaddress
import json
import time
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx2
from pydantic import BaseModel, ValidationError

from errors import UserError, shortened

CONNECT_SECONDS, READ_SECONDS = 10, 600  # waiting in a queue counts as reading
BUSY = (429, 503)
MOST_TRIES, LONGEST_WAIT = 8, 60  # of a busy server; seconds between two tries

Answered = TypeVar("Answered", bound=BaseModel)


class ServerGoneError(UserError):
    """A failure that other questions would meet too: no server, a refused key, an unknown model, a foreign protocol."""


class ServerConnection:
    """A server.

    Args:
        url: base URL; without a path, `/v1` is added.
        key: API key; None: none.

    Raises:
        UserError: not a URL.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = _split(url)
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._client = httpx2.Client(
            headers={} if key is None else {b"Authorization": b"Bearer " + key.encode()},
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not _is_local(parts.hostname or ""),  # a proxy of the environment cannot reach this machine
        )

    def fetch(self, kind: type[Answered], method: str, path: str, fields: dict[str, Any] | None = None) -> Answered:
        """Send a request; return the answer, checked against `kind`.

        Raises:
            ServerGoneError, UserError: as `opened`; or the answer breaks off or has another form.
        """
        with self.opened(method, path, fields) as response:
            try:
                return kind.model_validate_json(response.read())
            except httpx2.HTTPError as error:
                raise self._broken(error) from error
            except ValidationError as error:
                raise self.foreign(response.text) from error

    def events(self, kind: type[Answered], response: httpx2.Response) -> Iterator[Answered]:
        """Yield the events of a stream up to its end, or up to where it breaks off; errors as `fetch`."""
        try:
            for line in _lines(response):
                if not line.startswith("data:"):  # an empty line, a comment, or another field of the event
                    continue
                content = line.removeprefix("data:").strip()
                if content == "[DONE]":
                    return
                if sentence := _error_in(content):
                    raise UserError(f"{self.url} ended the answer: {sentence}")
                try:
                    yield kind.model_validate_json(content)
                except ValidationError as error:
                    raise self.foreign(content) from error
        except httpx2.HTTPError as error:
            raise self._broken(error) from error

    @contextlib.contextmanager
    def opened(self, method: str, path: str, fields: dict[str, Any] | None = None) -> Iterator[httpx2.Response]:
        """Send a request, again to a busy server; give the response, which is not read yet.

        Raises:
            ServerGoneError: see there.
            UserError: the server refuses this request.
        """
        for tried in range(1, MOST_TRIES + 1):
            request = self._client.build_request(method, self.url + path, json=fields)
            try:
                response = self._client.send(request, stream=True)
            except httpx2.HTTPError as error:
                what = shortened(str(error) or type(error).__name__)
                raise ServerGoneError(
                    f"no answer from {self.url} ({what}): start the server, or correct --server"
                ) from error
            with contextlib.closing(response):
                if response.is_success:
                    yield response
                    return
                try:
                    response.read()
                except httpx2.HTTPError as error:
                    raise self._broken(error) from error
            wait = response.headers.get("retry-after", "1" if response.status_code == 429 else "")
            if tried == MOST_TRIES or response.status_code not in BUSY or not wait.isdecimal():
                raise self._refusal(response)
            time.sleep(min(int(wait), LONGEST_WAIT))

    def broken_off(self, text: str) -> ServerGoneError:
        return ServerGoneError(f"the answer of {self.url} broke off after {len(text)} characters: ask again")

    def foreign(self, content: str) -> ServerGoneError:
        return ServerGoneError(
            f"{self.url} does not speak OpenAI's protocol, it says {shortened(repr(content), 80)}: correct --server"
        )

    def _broken(self, error: Exception) -> ServerGoneError:
        what = shortened(str(error) or type(error).__name__)
        return ServerGoneError(f"the connection to {self.url} broke within an answer ({what}): ask again")

    def _refusal(self, response: httpx2.Response) -> UserError:
        sentence, status = _error_in(response.text), response.status_code
        if status in (401, 403):
            return ServerGoneError(f"{self.url} refuses the key ({sentence or status}): give the right --api-key")
        if status in BUSY and sentence is not None:
            return ServerGoneError(f"{self.url} is busy ({sentence}): ask later")
        if sentence is None:
            return ServerGoneError(f"{self.url} answers with status {status} and no reason: correct --server")
        kind = ServerGoneError if status == 404 or status >= 500 else UserError
        return kind(f"{self.url} refuses: {sentence}")


def _lines(response: httpx2.Response) -> Iterator[str]:
    """Yield lines that end in a line feed; the client's own also end at characters that JSON may hold, as U+2028."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    yield rest.decode(errors="replace")


def _error_in(content: str) -> str | None:
    """Return the sentence of OpenAI's error shape; None if `content` has another form."""
    try:
        match json.loads(content):
            case {"error": {"message": str(message)}} | {"error": str(message)}:
                return shortened(message, 500)
    except (ValueError, RecursionError):
        pass
    return None


def _split(url: str) -> SplitResult:
    if "@" in url.rpartition("://")[2].partition("/")[0]:  # not repeated here: others may see the sentence
        raise UserError("--server: a URL with a name or password would be shown to others: give a key with --api-key")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a wrong one
        if parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment):
            httpx2.URL(url)  # refuses more than urlsplit does, such as an invisible character in the host
            return parts
    except (ValueError, httpx2.InvalidURL):
        pass
    raise UserError(f"--server: {shortened(repr(url))} is not a URL such as http://127.0.0.1:8000/v1")


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
