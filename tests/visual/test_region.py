"""Regions: boxes in pixels or fractions of the upright photo; a wrong one is refused in one sentence."""

import pytest
from PIL import Image

from errors import UserError
from visual.photo import load_image, photo_size
from visual.region import Region, checked_box, parse_box, pixel_box


@pytest.fixture
def photo(tmp_path):
    """A photo of 40 × 20 px that is stored turned: its upright left half is red, its right half blue."""
    upright = Image.new("RGB", (40, 20), (255, 0, 0))
    upright.paste((0, 0, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees counterclockwise
    file = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    return file


def test_the_box_is_in_the_upright_photo(photo):
    right = load_image(Region(photo, (20, 5, 40, 20)))
    assert right.size == photo_size(Region(photo, (20, 5, 40, 20))) == (20, 15)
    assert right.getcolors() == [(300, (0, 0, 255))]
    assert load_image(Region(load_image(photo), (0, 0, 20, 20))).getcolors() == [(400, (255, 0, 0))]


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("3,4,10,12", (3, 4, 10, 12)),
        (" 3, 4, 10, 12", (3, 4, 10, 12)),
        ("0.25,0,0.5,1", (25, 0, 50, 80)),
        ("0.07,0.1,0.29,0.2", (7, 8, 29, 16)),  # 0.07 * 100 and 0.29 * 100 are not whole
        ("0.001,0.001,0.002,0.002", (0, 0, 1, 1)),  # enlarged to whole pixels, never empty
        ("0.0,0.0,0.0000000001,1.0", (0, 0, 1, 80)),
        ("0.99999999999,0.99999999999,1.0,1.0", (99, 79, 100, 80)),
        ("0.0,0.0,1.0,1.0", (0, 0, 100, 80)),
        ("0,0,1,1", (0, 0, 1, 1)),  # pixels: no point
        ("0.0,0.0,10.0,10.0", (0, 0, 10, 10)),
        ("5e-05,0.0,0.5,0.5", (0, 0, 50, 40)),  # as Python writes 0.00005
    ],
)
def test_pixels_and_fractions(text, pixels):
    assert pixel_box(parse_box(text), 100, 80) == pixels


@pytest.mark.parametrize(
    "text",
    ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1;2;3;4", "nan,0.0,1.0,1.0", "0.0,0.0,inf.,1.0", "1e3,0,2,2", "1,2,3,"],
)
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="is not x0,y0,x1,y1 in pixels"):
        parse_box(text)


@pytest.mark.parametrize("value", [None, "1,2,3,4", [1, 2, 3], {}, [1, 2, 3, True], [0, 0, 1, 10**400], [0, 0, "1", 1]])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match="is not x0,y0,x1,y1 in pixels"):
        checked_box(value)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((5, 5, 5, 9), "is empty"),
        ((5, 9, 8, 2), "is empty"),
        ((-1, 0, 8, 2), "begins outside the photo"),
        ((-0.1, 0.0, 1.0, 1.0), "begins outside the photo"),
        ((0, 0, 101, 2), "ends outside the photo of 100×80 pixels"),
        ((0, 0, 2, 81), "ends outside the photo of 100×80 pixels"),
        ((0.5, 0.5, 1.0, 1.5), "neither whole pixels nor fractions"),
        ((10.5, 1, 20, 20), "neither whole pixels nor fractions"),
    ],
)
def test_a_wrong_box_is_named(box, problem):
    with pytest.raises(UserError, match=problem) as caught:
        pixel_box(box, 100, 80)
    assert ",".join(map(str, box)) in str(caught.value)
