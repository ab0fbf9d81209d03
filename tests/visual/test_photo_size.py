"""The size of a photo without its pixels is that of the decoded photo, whatever its orientation and where it stands."""

import struct

import pytest
from PIL import Image, PngImagePlugin

from visual.photo import load_image, photo_size


def exif_of(kind, value):
    """An EXIF block whose orientation is one value of another TIFF type than 3 (SHORT)."""
    tag = struct.pack("<HHI", 0x0112, kind, len(value)) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + tag + bytes(4)


@pytest.mark.parametrize(("kind", "value"), [(1, b"\6"), (2, b"6\0"), (7, b"\6")], ids=["BYTE", "ASCII", "UNDEFINED"])
def test_an_orientation_of_another_type_is_none(tmp_path, kind, value):
    Image.new("RGB", (6, 18)).save(tmp_path / "a.jpg", exif=exif_of(kind, value))
    assert load_image(tmp_path / "a.jpg").size == photo_size(tmp_path / "a.jpg") == (6, 18)


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the PNG photos that Pillow decodes, one for each time."""
    load, sizes = PngImagePlugin.PngImageFile.load, []

    def counted(image):
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", counted)
    return sizes


@pytest.mark.parametrize("turned", [False, True])
def test_a_png_is_not_decoded(tmp_path, decoded, turned):
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.new("RGB", (6, 18)).save(tmp_path / "a.png", exif=exif)
    decoded.clear()
    assert photo_size(tmp_path / "a.png") == ((18, 6) if turned else (6, 18))
    assert decoded == []


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("form", ["chunk", "XMP", "profile"])
def test_an_orientation_anywhere_in_a_png(tmp_path, form, place):
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngImagePlugin.PngInfo()
    if form == "XMP":
        texts.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    elif form == "profile":
        texts.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}", zip=True)
    file = tmp_path / "a.png"
    Image.effect_noise((60, 180), 50).save(file, exif=exif if form == "chunk" else None, pnginfo=texts)
    content = file.read_bytes()
    [name] = [name for name in (b"eXIf", b"iTXt", b"zTXt") if name in content]
    start = content.index(name) - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    if place == "behind":
        file.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert load_image(file).size == photo_size(file) == (180, 60)
