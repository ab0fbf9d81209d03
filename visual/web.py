"""Shards at an address (`https://…`, `hf://…`, `s3://…`): lists of them, whole ones, and ranges of their bytes.

fsspec reads them, which torch brings. It knows most stores; some need one more package, which the error names. This
module imports no torch.
"""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from errors import UserError, shortened
from paths import address

WAITS = (1, 4, 15)  # seconds before the tries after the first: a server that is restarted is back by then
READ_AHEAD = 2**20  # bytes of a request while a shard is read from its beginning to its end
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000
_Result = TypeVar("_Result")


class NetworkError(UserError):
    """A store does not answer, or not as it should. That says nothing about a photo, so none may be left out."""


def list_shards(place: str | Path) -> list[str]:
    """Return the addresses of the shards of a folder, or of a pattern such as `…/part-{00000..00099}.tar`.

    Raises:
        UserError: the server lists no shards in this folder, or cannot be asked; or the pattern is wrong.
    """
    url = _address(place)
    if not url.endswith(".tar"):
        found = _try(lambda files, path: files.glob(f"{path.rstrip('/')}/*.tar"), url)
        if found:
            scheme = url.partition("://")[0]
            return sorted(one if "://" in one else f"{scheme}://{one.lstrip('/')}" for one in found)
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
    return _try(lambda files, path: files.open(path, "rb", block_size=READ_AHEAD), _address(place))


def read_range(place: str | Path, start: int, end: int) -> bytes:
    """Return the bytes from `start` to `end` of a shard, or less if it ends before."""
    content = _try(lambda files, path: files.cat_file(path, start=start, end=end), _address(place))
    if len(content) > end - start:
        raise web_error(OSError("it gives the whole file instead of a part"), _address(place))
    return content


@functools.lru_cache(maxsize=10_000)
def web_state(place: str | Path) -> str:
    """Return what the server says about a shard that changes with it: its size, and its hash or date."""
    info = _try(lambda files, path: files.info(path), _address(place))
    marks = (info.get(name) for name in ("ETag", "etag", "md5", "blob_id", "mtime", "LastModified", "Last-Modified"))
    return f"{info.get('size')} {next((mark for mark in marks if mark), '')}"


def web_error(error: Exception, url: str) -> UserError:
    """Return an error that says what is wrong with the shard at an address; a NetworkError if it may well be there."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"shard not found: {shortened(url)}")
    if isinstance(error, ImportError):
        return UserError(f"{shortened(url)}: reading it needs a package that is missing: {shortened(error)}")
    what = shortened(str(error) or type(error).__name__)
    advice = "check the address and the network; the server must give ranges of bytes"
    return NetworkError(f"{shortened(url)} cannot be fetched ({what}): {advice}")


def _address(place: str | Path) -> str:
    url = address(place)
    assert url is not None, "only what is on the web is asked for here"
    return url


def _try(ask: Callable[[Any, str], _Result], url: str) -> _Result:
    """Ask the file system of an address, again after each of `WAITS` if the network failed.

    Raises:
        UserError: it failed every time, or in a way that waiting does not mend.
    """
    from fsspec.core import url_to_fs  # takes 0.1 s, and few need it

    for wait in (*WAITS, None):
        try:
            files, path = url_to_fs(url)  # keeps the file systems of this process, and makes new ones after a fork
            return ask(files, path)
        except Exception as error:  # each store has errors of its own
            lasting = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
            if wait is None or lasting:
                raise web_error(error, url) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")
