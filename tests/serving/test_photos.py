"""Photos of a request: every kind that is taken, and each that is refused, without a server."""

import base64
import io
import os

import pytest
from PIL import Image

from serving.photos import NO_SUCH_FILE, PhotoFile, decode_photos, find_photo
from serving.protocol import RefusalError
from tests.telling import data_url


def decoded(url, folder=None, most_pixels=10_000):
    return decode_photos([find_photo(url, "here", folder)], most_pixels)[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_kind_of_data_url(kind):
    image = decoded(data_url((9, 7), kind))
    assert (image.size, image.mode) == ((9, 7), "RGB")
    assert image.getpixel((4, 3))[0] > 200


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("blue", "red")]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    url = f"data:image/gif;base64,{base64.b64encode(stream.getvalue()).decode()}"
    assert decoded(url).getpixel((1, 1)) == (0, 0, 255)


def test_the_content_counts_and_not_the_named_kind():
    assert decoded(data_url((9, 7), "JPEG").replace("jpeg", "png").replace("data:", "DATA:")).size == (9, 7)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/cat.png", "fetches nothing from the network"),
        ("https://example.com/cat.png", "fetches nothing from the network"),
        ("ftp://example.com/cat.png", "fetches nothing from the network"),
        ("//example.com/cat.png", "fetches nothing from the network"),
        ("photos/cat.png", "fetches nothing from the network"),
        ("", "fetches nothing from the network"),
        ("file:///etc/passwd", "--allow-files DIR was not given"),
        ("data:text/plain;base64,QUJD", "sent as data:image/jpeg;base64"),
        ("data:image/png,ABC", "sent as data:image/jpeg;base64"),
        ("data:image/png;base64", "sent as data:image/jpeg;base64"),
        ("data:image/png;base64,A", "not valid base64"),
        ("data:image/png;base64,QU JD", "not valid base64"),
        ("data:image/png;base64,中文", "not valid base64"),
        ("data:image/png;base64,", "not an image"),
        ("data:image/png;base64,QUJD", "not an image"),
        (data_url((99, 99), "JPEG")[: 23 + 700], "fetch the photo again"),
        (data_url((101, 100)), "more than the 0.01 that are decoded"),
    ],
)
def test_what_is_refused(url, message):
    with pytest.raises(RefusalError, match=message) as caught:
        decoded(url)
    assert (caught.value.status, caught.value.param) == (400, "here")
    assert str(caught.value).startswith("'here': ")


def test_the_pixels_of_all_photos_count_together():
    photos = [find_photo(data_url((60, 50)), f"photo {number}", None) for number in range(4)]
    assert len(decode_photos(photos[:3], 9000)) == 3
    for photo in photos:
        photo.content.seek(0)
    with pytest.raises(
        RefusalError, match="'photo 3': the photos of a request have more than 0.009 megapixels"
    ) as caught:
        decode_photos(photos, 9000)
    assert caught.value.status == 413


@pytest.fixture
def tree(tmp_path):
    """A folder that may be read beside a secret one, with links that lead out and within."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (inside / "a b#.png", inside / "sub" / "红.png", outside / "secret.png"):
        Image.new("RGB", (5, 4)).save(file)
    os.symlink(outside / "secret.png", inside / "link.png")
    os.symlink(outside, inside / "folder")
    os.symlink(inside / "a b#.png", inside / "sub" / "inner.png")
    os.symlink(inside, tmp_path / "alias")
    return tmp_path


@pytest.mark.parametrize("folder", ["in", "alias"])
def test_files_of_the_named_folder(tree, folder):
    allowed = tree / folder
    for path in (allowed / "a b#.png", allowed / "sub" / "红.png", allowed / "sub" / "inner.png"):
        assert decoded(path.as_uri(), allowed).size == (5, 4)
    assert decoded(path.as_uri().replace("file:///", "file://localhost/"), allowed).size == (5, 4)
    assert isinstance(find_photo((allowed / "a b#.png").as_uri(), "here", allowed), PhotoFile)


@pytest.mark.parametrize(
    "path",
    [
        "in/link.png",
        "in/folder/secret.png",
        "in/../out/secret.png",
        "in/%2e%2e/out/secret.png",
        "in/sub/../../out/secret.png",
        "in/missing.png",
        "in/sub",
        "in",
        "in/a%00.png",
        "in/" + "x" * 300,
        "out/secret.png",
        "in-other/x.png",
        "",
    ],
)
def test_no_other_file_is_read_and_none_is_revealed(tree, path):
    with pytest.raises(RefusalError) as caught:
        decoded(f"file://{tree}/{path}", tree / "in")
    assert str(caught.value) == f"'here': {NO_SUCH_FILE}"


@pytest.mark.parametrize(
    "url", ["file://example.com{}", "file://{}?x", "file://{}#x", "file:relative.png", "file:////host/x"]
)
def test_other_forms_of_file_urls(tree, url):
    with pytest.raises(RefusalError):
        decoded(url.format(tree / "in" / "a b#.png"), tree / "in")


def test_a_file_that_is_no_photo_is_said(tree):
    (tree / "in" / "text.png").write_text("text")
    with pytest.raises(RefusalError, match="text.png: not an image"):
        decoded((tree / "in" / "text.png").as_uri(), tree / "in")
