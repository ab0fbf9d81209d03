"""How photos travel to a server: the bytes of their files where every server reads them as we do, else a PNG."""

import base64
import io
import tarfile

import pytest
from PIL import ExifTags, Image

from answering.remote import data_url
from errors import UserError
from visual.shard import Member

RED = Image.new("RGB", (4, 3), "red")


def as_png(url):
    """The photo of a URL, which is a PNG."""
    head, _, content = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_of_the_web_are_sent_as_they_are(tmp_path, kind):
    file = tmp_path / "photo"
    RED.save(file, kind)
    head, _, content = data_url(file).partition(",")
    sent = base64.b64decode(content)
    if kind in ("BMP", "TIFF"):
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(sent)).convert("RGB").tobytes() == RED.tobytes()
    else:
        assert (head, sent) == (f"data:image/{kind.lower()};base64", file.read_bytes())


def test_a_photo_is_sent_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    RED.save(tmp_path / "turned.jpg", exif=exif)
    head, _, content = data_url(tmp_path / "turned.jpg").partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (3, 4)
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UserError, match="text.jpg: not an image"):
        data_url(tmp_path / "text.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_is_left_out(tmp_path, kind):
    """Pillow itself passes over it only while it opens a JPEG without a resolution."""
    RED.save(tmp_path / "photo", kind, exif=b"Exif\0\0II*\0\xff", **({"dpi": (72, 72)} if kind == "JPEG" else {}))
    assert as_png(data_url(tmp_path / "photo")).size == (4, 3)


def test_a_photo_of_a_shard_is_sent(tmp_path):
    file = io.BytesIO()
    RED.save(file, "BMP")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.bmp")
        info.size = len(file.getvalue())
        tar.addfile(info, io.BytesIO(file.getvalue()))
    with tarfile.open(tmp_path / "a.tar") as tar:
        (info,) = tar
    member = Member(str(tmp_path / "a.tar"), info.name, info.offset_data, info.size)
    assert as_png(data_url(member.path)).convert("RGB").tobytes() == RED.tobytes()
