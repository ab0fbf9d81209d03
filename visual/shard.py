"""Photos inside uncompressed tar files ("shards", as WebDataset packs them).

Millions of photos are slow to list, copy and delete as files of their own, and some file systems have no room for so
many. The path of a photo in a shard says where its bytes are, so reading it takes one seek, and nothing has to know the
other members:

    photos/part-00007.tar/000123.jpg@1536+24012         24,012 bytes from byte 1,536 of photos/part-00007.tar on

The shard may also be at an address: `https://host/photos/part-00007.tar/…`. Then reading takes one request.
`dataset/shards.py` writes such paths, `visual/photo.py` reads them. This module imports no torch.
"""

import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from errors import UserError, file_error, shortened
from paths import address
from visual.web import read_range

_PATH = re.compile(r"(.+\.tar)/(.+)@(\d{1,18})\+(\d{1,18})", re.DOTALL)
_REMEDY = "run process_image.py again"


class Member(NamedTuple):
    """A file in a shard: `size` bytes from byte `start` on; its name is one of `member_name`."""

    shard: str
    name: str
    start: int
    size: int

    @property
    def path(self) -> str:
        return f"{self.shard}/{self.name}@{self.start}+{self.size}"


def member_of(path: str | Path) -> Member | None:
    """Return the member that a path means; None: it is the path of an ordinary file."""
    found = _PATH.fullmatch(Path(path).as_posix())
    return found and Member(address(found[1]) or found[1], found[2], int(found[3]), int(found[4]))


def member_name(name: str) -> str:
    """Return the name of a tar header as it is in a path: `/` between its parts, none before them, and no part `.`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def file_of(path: str | Path) -> Path:
    """Return the file that has the photo: the shard, or the path itself."""
    member = member_of(path)
    return Path(path if member is None else member.shard)


def without_place(path: str) -> str:
    """Return a path without the place of the bytes, which changes when the shard is packed anew."""
    return path if member_of(path) is None else path.rpartition("@")[0]


def read_member(member: Member) -> bytes:
    """Return the bytes of a member.

    Raises:
        UserError: the shard is missing or cannot be read, or it has something else at that place.
        WebError: the server of its address does not answer, or not as it should.
    """
    block = tarfile.BLOCKSIZE
    start, end = max(member.start - block, 0), member.start + member.size
    read = read_range if address(member.shard) else _read_file
    both = read(member.shard, start, end)
    content = both[block:]
    try:
        header = tarfile.TarInfo.frombuf(both[:block], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(f"{member.path}: the shard has no file there any more: {_REMEDY}") from error
    # a header has the first 100 bytes of a longer name, in UTF-8 (GNU tar) or with "?" for other letters (POSIX)
    names = member.name.encode("utf-8", "surrogateescape"), member.name.encode("ascii", "replace")
    found = member_name(header.name).encode("utf-8", "surrogateescape")
    if header.size != member.size or not any(name.startswith(found) for name in names):
        raise UserError(f"{member.path}: the shard has {shortened(header.name)} there: {_REMEDY}")
    if len(content) < member.size:
        raise UserError(f"{member.path}: the shard ends before: it was cut off, fetch it again")
    return content


def _read_file(shard: str, start: int, end: int) -> bytes:
    try:
        with open(shard, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError as error:
        raise UserError(f"shard not found: {shortened(shard)}") from error
    except OSError as error:
        raise file_error(error, f"shard {shortened(shard)}") from error
