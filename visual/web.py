"""Shards at an address (`https://…`, `hf://…`, `s3://…`): lists of them, whole ones, and ranges of their bytes.

fsspec reads them, which torch brings. It knows most stores; some need one more package, which the error names. This
module imports no torch.
"""

import functools
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from errors import UserError, shortened
from paths import address

WAITS = (1, 4, 15)  # seconds before the tries after the first: a server that is restarted is back by then
CONNECT, SILENT = 10, 20  # seconds until a web server must have answered, and between two parts of its answer
READ_AHEAD = 2**20  # bytes of a request while a shard is read from its beginning to its end
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000
_MAY_PASS = (408, 425, 429)  # of the answers 4xx, those that waiting mends
_Result = TypeVar("_Result")


NO_SIZES = (
    "'visual.tiles' needs the size of each photo before it is read, so shards must be on a disk: copy them, or set "
    "visual.tiles=0"
)


class WebError(UserError):
    """A store does not answer, or not as it should. That says nothing about a photo, so none may be left out."""


def list_shards(place: str | Path) -> list[str]:
    """Return the addresses of the shards of a folder, or of a pattern such as `…/part-{00000..00099}.tar`.

    Raises:
        UserError: the server lists no shards in this folder, or cannot be asked; or the address cannot be read.
    """
    url = _address(place)
    if "?" in url or "#" in url:
        raise UserError(f"{shortened(url)}: addresses with '?' or '#' are not read")
    if not url.endswith(".tar"):
        folder = url.rstrip("/")
        found = _ask(lambda files, path: files.glob(f"{path.rstrip('/')}/*.tar"), url)
        if found:
            return sorted(f"{folder}/{one.rpartition('/')[2]}" for one in found)
        raise UserError(f"{shortened(url)}: this address lists no file that ends in .tar: name the shards as "
                        "'…/part-{00000..00099}.tar' in 'annotations'")  # fmt: skip
    numbers = _RANGE.search(url)
    if numbers is None:
        return [url]
    first, last = int(numbers[1]), int(numbers[2])
    if not first <= last < first + _MOST_SHARDS:
        raise UserError(f"{shortened(url)}: {numbers[0]} is no range of numbers, or one of more than {_MOST_SHARDS:,}")
    before, after = url[: numbers.start()], url[numbers.end() :]
    return [f"{before}{number:0{len(numbers[1])}}{after}" for number in range(first, last + 1)]


def open_web(place: str | Path) -> BinaryIO:
    """Open a shard that is read from its beginning to its end."""
    return io.BufferedReader(_WebFile(_address(place)), READ_AHEAD)


class _WebFile(io.RawIOBase):
    """A file at an address; each read is one request of `read_range`, for fsspec's own files ask once only."""

    def __init__(self, url: str) -> None:
        self.url, self.place = url, 0
        size = _ask(lambda files, path: files.info(path), url).get("size")
        if size is None:
            raise WebError(f"{shortened(url)}: the server does not say how large it is")
        self.size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        end = min(self.place + len(buffer), self.size)
        content = read_range(self.url, self.place, end) if self.place < end else b""
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def read_range(place: str | Path, start: int, end: int) -> bytes:
    """Return the bytes from `start` to `end` of a shard, or less if it ends before.

    Raises:
        UserError: there is no such shard.
        WebError: it cannot be asked for, or the server has no ranges of bytes.
    """

    def ask(files: Any, path: str) -> bytes:
        if files.async_impl and "http" not in files.protocol:
            return files.cat_file(path, start=start, end=end)
        # others read ahead, and of a server without ranges `cat_file` would take the whole file into memory
        with files.open(path, "rb", cache_type="none", size=end) as file:
            file.seek(start)
            return file.read(end - start)

    return _ask(ask, _address(place))


@functools.lru_cache(maxsize=10_000)
def web_state(place: str | Path) -> str:
    """Return what the server says about a shard that changes with it: its size, and its hash or date."""
    info = _ask(lambda files, path: files.info(path), _address(place))
    marks = (info.get(name) for name in ("ETag", "etag", "md5", "blob_id", "mtime", "LastModified", "Last-Modified"))
    return f"{info.get('size')} {next((mark for mark in marks if mark), '')}"


def _address(place: str | Path) -> str:
    url = address(place)
    assert url is not None, "only what is on the web is asked for here"
    return url


def _ask(ask: Callable[[Any, str], _Result], url: str) -> _Result:
    """Ask the file system of an address, again after each of `WAITS` if the network failed.

    Raises:
        UserError: it failed every time, or in a way that waiting does not mend.
    """
    for wait in (*WAITS, None):
        try:
            return ask(*_store(url))
        except Exception as error:  # each store has errors of its own
            cause = _cause(error)
            if wait is None or _lasts(cause):
                raise _explained(cause, url) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _store(url: str) -> tuple[Any, str]:
    """Return the file system of an address and the path there; fsspec keeps it, and makes another after a fork."""
    from fsspec.core import url_to_fs  # takes 0.1 s, and few need it

    if not url.startswith(("http://", "https://")):
        return url_to_fs(url)
    import aiohttp  # an optional package

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENT)
    return url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})  # trust_env: HTTPS_PROXY counts


def _cause(error: Exception) -> BaseException:
    """Return what happened; fsspec calls every failure of a web server a missing file."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def _status(cause: BaseException) -> int | None:
    """Return the status that an HTTP server answered; None: no server did."""
    return getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)


def _lasts(cause: BaseException) -> bool:
    """Whether waiting does not mend it."""
    status = _status(cause)
    if status is not None:
        return 400 <= status < 500 and status not in _MAY_PASS
    return isinstance(cause, FileNotFoundError | PermissionError | ImportError | ValueError)


def _explained(cause: BaseException, url: str) -> UserError:
    status, name = _status(cause), shortened(url)
    what = shortened(str(cause) or type(cause).__name__)
    if status in (404, 410) or isinstance(cause, FileNotFoundError):
        return UserError(f"shard not found: {name}")
    if isinstance(cause, ImportError):
        return UserError(f"{name}: reading it needs a package that is missing: {what}")
    if status in (401, 403) or isinstance(cause, PermissionError):
        return WebError(f"{name}: the server refuses it ({what}): check the address and your rights")
    if isinstance(cause, ValueError):
        return WebError(f"{name} cannot be read ({what}): check the address; the server must give ranges of bytes")
    return WebError(f"{name} cannot be fetched ({what}): check the address and the network")
