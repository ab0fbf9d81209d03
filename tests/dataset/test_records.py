"""The two files: what is written is read back, and every mistake in them is named."""

import contextlib
import errno
import json
import os
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.records import Entry, Photo, Turn, read_records, write_json_files, write_records
from errors import UserError
from paths import REPO_ROOT

TAG = "<|extra_0|>"
PHOTOS = {
    "p/1.jpg": {"ID": 0, "image_file": "1.jpg", "path": "data/p/1.jpg"},
    "照片/2.jpg": {"ID": 1, "image_file": "2.jpg", "path": "/photos/照片/2.jpg"},
}


def question(**change):
    return {"source": "s", "q": f"{TAG}\nWhy?", "a": ["So."]} | change


def dialogue(later, *, first=None, **change):
    """A dialogue of two turns with a tag in each question; `later` and `first` change the turns."""
    turns = [{"q": f"{TAG}1?", "a": "one"} | (first or {}), {"q": f"2?{TAG}", "a": "two"}]
    turns[1] = turns[1] | later if isinstance(later, dict) else later
    return {"source": "s", "turns": turns} | change


def write(folder, image_map, captions):
    paths = folder / "image_map.json", folder / "captions.json"
    for path, content in zip(paths, (image_map, captions), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def test_written_and_read_back(tmp_path):
    captions = {
        "1": [
            question(type="colour"),
            {"source": "t", "turns": [{"q": f"1?{TAG}", "a": ["一"]}, {"q": "2?", "a": ["2"]}]},
        ],
        "0": [question(images=[0, 1], q=f"{TAG}{TAG}Which?", a=["a", "b"])],
        "text": [question(q="1+1?")],
    }
    paths = tmp_path / "新 folder" / "image_map.json", tmp_path / "captions.json"
    write_records(PHOTOS, captions, *paths)
    photos, entries = read_records(*paths)
    assert photos == {
        0: Photo(0, "p/1.jpg", "1.jpg", REPO_ROOT / "data" / "p" / "1.jpg"),
        1: Photo(1, "照片/2.jpg", "2.jpg", Path("/photos/照片/2.jpg")),
    }
    assert entries == [
        Entry("s", "colour", (Turn(f"{TAG}\nWhy?", ("So.",), images=(1,)),)),
        Entry("t", "t", (Turn(f"1?{TAG}", ("一",), images=(1,)), Turn("2?", ("2",)))),
        Entry("s", "s", (Turn(f"{TAG}{TAG}Which?", ("a", "b"), images=(0, 1)),)),
        Entry("s", "s", (Turn("1+1?", ("So.",)),)),
    ]
    text = paths[1].read_text(encoding="utf-8")
    assert '\n      "source": "s"' in text
    assert "一" in text


def test_report_form(tmp_path):
    _, entries = read_records(*write(tmp_path, PHOTOS, {"1": {"q": f"{TAG}Why?", "a": "So."}}))
    assert entries == [Entry("unnamed", "unnamed", (Turn(f"{TAG}Why?", ("So.",), images=(1,)),))]


def test_type_of_a_turn(tmp_path):
    turns = [{"q": f"{TAG}How many?", "a": "2", "type": "count"}, {"q": "Why?", "a": "So."}]
    _, [entry] = read_records(*write(tmp_path, PHOTOS, {"1": [{"source": "s", "turns": turns}]}))
    assert [turn.type for turn in entry.turns] == ["count", ""]
    assert entry.type == "s"
    turns[1]["type"] = 3
    with pytest.raises(ValueError, match=r'ID 1, entry 0, turn 1 has a "type" that is no text'):
        read_records(*write(tmp_path, PHOTOS, {"1": [{"source": "s", "turns": turns}]}))


def test_photos_in_later_turns(tmp_path):
    turns = [
        {"q": f"{TAG} and {TAG}?", "a": ["one"]},
        {"q": f"What does {TAG} mean?", "a": ["two"]},
        {"q": f"{TAG}{TAG} or {TAG}?", "a": ["three"], "images": [0, 1]},
    ]
    captions = {
        "1": [{"source": "s", "images": [1, 0], "turns": turns}, dialogue({"images": [1]}, images=[])],
        "0": [dialogue({"images": [1]})],
        "text": [{"source": "s", "turns": turns[1:2]}],
    }
    paths = tmp_path / "image_map.json", tmp_path / "captions.json"
    write_records(PHOTOS, captions, *paths)
    _, [three, late, both, text] = read_records(*paths)
    assert [turn.images for turn in three.turns] == [(1, 0), (), (0, 1)]
    assert three.images == (1, 0, 0, 1)
    assert [turn.question for turn in three.turns] == [turn["q"] for turn in turns]
    assert [turn.images for turn in late.turns] == [(), (1,)]
    assert late.images == (1,)
    assert [turn.images for turn in both.turns] == [(0,), (1,)]
    assert text.images == ()


IMAGES = st.lists(st.integers(0, 1), max_size=3)


@given(st.lists(st.lists(IMAGES, min_size=1, max_size=4), max_size=4))
def test_photos_of_any_turns_are_read_back(tmp_path_factory, entries):
    """Written as `write_records` describes, the same entries are read, under whichever key they must stand."""
    captions, expected = {}, []
    for number, lists in enumerate(entries):
        shown = [ID for images in lists for ID in images]
        turns = [{"q": TAG * len(images) + "?", "a": [str(number)], "images": images} for images in lists]
        item = {"source": "s", "images": turns[0].pop("images"), "turns": turns}
        captions.setdefault(str(shown[0]) if shown else "text", []).append(item)
        expected.append((str(number), [tuple(images) for images in lists], tuple(shown)))
    folder = tmp_path_factory.getbasetemp()
    write_records(PHOTOS, captions, folder / "image_map.json", folder / "captions.json")
    _, read = read_records(folder / "image_map.json", folder / "captions.json")
    found = [(e.turns[0].answers[0], [turn.images for turn in e.turns], e.images) for e in read]
    assert sorted(found) == sorted(expected)


def test_photo_without_captions_and_later_tag_are_fine(tmp_path):
    _, [entry] = read_records(*write(tmp_path, PHOTOS, {"1": [question(q=f"{TAG} What does {TAG} mean?")]}))
    assert entry.turns[0].question == f"{TAG} What does {TAG} mean?"


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"2": [question()]}, r"captions\.json: ID '2' is not in .*image_map\.json; correct it or run process_image"),
        ({"one": [question()]}, r"ID 'one' is not in"),
        ([], r"the file is a list, not an object with photo IDs"),
        ({"1": [question(), "text"]}, r"ID 1, entry 1 is a str, not an object"),
        ({"1": [question(q="Why?")]}, r"ID 1, entry 0 has 1 photos but 0 tags <\|extra_0\|> in its question"),
        ({"1": [question(images=[1, 0])]}, r"has 2 photos but 1 tags"),
        (
            {"1": [question(images=[0, 1], q=TAG + TAG)]},
            r"ID 1, entry 0 shows photo 0 first, but the photo 1, its key, must come first",
        ),
        ({"1": [question(images=[])]}, r"shows no photo, but the photo 1, its key, must come first"),
        ({"1": [question(images=1)]}, r'has "images" of the type int, not a list of photo IDs'),
        ({"1": [question(images=[1, 5])]}, r"names the photo 5, which is not in the image map"),
        ({"1": [question(images=[True])]}, r"names the photo True, which is not in the image map"),
        ({"text": [question(images=[1])]}, r"'text', entry 0 shows photo 1 first, but entries under 'text' have none"),
        ({"1": [dialogue(["x"])]}, r"ID 1, entry 0, turn 1 is a list, not an object"),
        ({"1": [dialogue({"images": 1})]}, r'turn 1 has "images" of the type int, not a list of photo IDs'),
        ({"1": [dialogue({"images": [2]})]}, r"turn 1 names the photo 2, which is not in the image map"),
        ({"1": [dialogue({"images": [0, 0]})]}, r"turn 1 has 2 photos but 1 tags <\|extra_0\|> in its question"),
        ({"1": [dialogue({"images": [0]}, images=[])]}, r"ID 1, entry 0 shows photo 0 first, but the photo 1"),
        (
            {"1": [dialogue({"images": [1]}, first={"images": [1]})]},
            r'turn 0 has "images", but those of the first turn',
        ),
        ({"text": [dialogue({"images": [1]})]}, r"'text', entry 0 shows photo 1 first, but entries under 'text'"),
        ({"1": [question(a=[])]}, r'must have a question "q" and an answer or answers "a"'),
        ({"1": [question(a=["x", ""])]}, r'must have a question "q"'),
        ({"1": [question(a=["x", 1])]}, r'must have a question "q"'),
        ({"1": [question(q=None)]}, r'must have a question "q"'),
        ({"text": [{"source": "s", "q": "Why?"}]}, r"'text', entry 0 must have a question"),
        ({"1": [{"source": "s", "turns": []}]}, r'"turns" must be a list of at least one'),
        ({"1": [{"source": "s", "turns": [{"q": TAG, "a": "x"}, {"q": "?"}]}]}, r'must have a question "q"'),
        ({"1": [question(source=1)]}, r'"source" and "type" must be texts'),
        ({"1": [question(type=1)]}, r'"source" and "type" must be texts'),
    ],
)
def test_wrong_captions(tmp_path, captions, message):
    with pytest.raises(ValueError, match=message):
        read_records(*write(tmp_path, PHOTOS, captions))


def photo(ID=0, **change):
    return {"ID": ID, "image_file": "1.jpg", "path": "p/1.jpg"} | change


@pytest.mark.parametrize(
    ("image_map", "message"),
    [
        ([], r"image_map\.json: the file is a list"),
        ({"a": photo(), "b": photo()}, r"ID 0 is given to both 'a' and 'b'"),
        ({"a": photo(), "b": photo(2)}, r"ID 1 is missing: 2 photos must have the IDs 0 to 1"),
        ({"a": photo("0")}, r"'a' does not hold a whole number \"ID\""),
        ({"a": photo(False)}, r"'a' does not hold a whole number"),
        ({"a": photo(path=None)}, r"'a' does not hold"),
        ({"a": 0}, r"'a' does not hold"),
    ],
)
def test_wrong_image_map(tmp_path, image_map, message):
    with pytest.raises(ValueError, match=message):
        read_records(*write(tmp_path, image_map, {}))


def test_missing_file_and_wrong_json(tmp_path):
    image_map, captions = write(tmp_path, PHOTOS, {})
    captions.write_text('{"0":\n[}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"captions\.json: not valid JSON at line 2, column 2"):
        read_records(image_map, captions)
    captions.unlink()
    with pytest.raises(ValueError, match=r"captions\.json: file not found"):
        read_records(image_map, captions)


def test_failed_write_leaves_the_old_files(tmp_path):
    paths = tmp_path / "image_map.json", tmp_path / "captions.json"
    write_records(PHOTOS, {"0": [question()]}, *paths)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_records({}, {"0": [object()]}, *paths)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


class TestUnwritable:
    """An error of the operating system is one sentence; the old files stay, and no temporary file does."""

    @pytest.fixture
    def files(self, tmp_path):
        files = {tmp_path / "a.json": [1], tmp_path / "b.json": [2]}
        write_json_files(files)
        return files

    def refused(self, files, message):
        folder = next(iter(files)).parent
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(UserError, match=message):
            write_json_files({path: [*content, 3] for path, content in files.items()})
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    def test_disk_full(self, files, monkeypatch):
        synced = []

        def sync(number):
            if synced:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            synced.append(number)

        monkeypatch.setattr(os, "fsync", sync)
        self.refused(files, rf"cannot write .*b\.json: {os.strerror(errno.ENOSPC)}; mend that or choose another path")

    def test_folder_of_that_name(self, files, tmp_path):
        (tmp_path / "c.json").mkdir()
        self.refused(files | {tmp_path / "c.json": [3]}, r"cannot write .*c\.json: it is a folder")

    def test_below_a_file(self, files, tmp_path):
        self.refused(files | {tmp_path / "a.json" / "c.json": [3]}, r"cannot write .*c\.json: ")

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
    def test_proc(self, files):
        self.refused(files | {Path("/proc/none/c.json"): [3]}, r"cannot write /proc/none/c\.json: ")


def test_same_path_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'data\.image_map' and 'data\.captions' are both"):
        write_records({}, {}, tmp_path / "a.json", tmp_path / "." / "a.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from(["q", TAG, "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "1", "text", "source", "q", "a", "turns", "images", "type"]), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_is_read_or_refused(tmp_path_factory, captions):
    folder = tmp_path_factory.getbasetemp()
    (folder / "image_map.json").write_bytes(orjson.dumps(PHOTOS))
    (folder / "captions.json").write_bytes(orjson.dumps(captions))
    with contextlib.suppress(ValueError):
        read_records(folder / "image_map.json", folder / "captions.json")
