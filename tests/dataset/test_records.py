"""The two files: what is written is read back, every mistake in them is named, the split keeps photos whole."""

import contextlib
import errno
import json
import os
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.records import Entry, Photo, Turn, read_records, split_entries, write_json_files, write_records
from errors import UserError
from paths import REPO_ROOT

TAG = "<|extra_0|>"
PHOTOS = {
    "p/1.jpg": {"ID": 0, "image_file": "1.jpg", "path": "data/p/1.jpg"},
    "照片/2.jpg": {"ID": 1, "image_file": "2.jpg", "path": "/photos/照片/2.jpg"},
}


def question(**change):
    return {"source": "s", "q": f"{TAG}\nWhy?", "a": ["So."]} | change


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
        Entry((1,), "s", "colour", (Turn(f"{TAG}\nWhy?", ("So.",)),)),
        Entry((1,), "t", "t", (Turn(f"1?{TAG}", ("一",)), Turn("2?", ("2",)))),
        Entry((0, 1), "s", "s", (Turn(f"{TAG}{TAG}Which?", ("a", "b")),)),
        Entry((), "s", "s", (Turn("1+1?", ("So.",)),)),
    ]
    text = paths[1].read_text(encoding="utf-8")
    assert '\n      "source": "s"' in text
    assert "一" in text


def test_report_form(tmp_path):
    _, entries = read_records(*write(tmp_path, PHOTOS, {"1": {"q": f"{TAG}Why?", "a": "So."}}))
    assert entries == [Entry((1,), "unnamed", "unnamed", (Turn(f"{TAG}Why?", ("So.",)),))]


def test_type_of_a_turn(tmp_path):
    turns = [{"q": f"{TAG}How many?", "a": "2", "type": "count"}, {"q": "Why?", "a": "So."}]
    _, [entry] = read_records(*write(tmp_path, PHOTOS, {"1": [{"source": "s", "turns": turns}]}))
    assert [turn.type for turn in entry.turns] == ["count", ""]
    assert entry.type == "s"
    turns[1]["type"] = 3
    with pytest.raises(ValueError, match='"type" of a turn must be a text'):
        read_records(*write(tmp_path, PHOTOS, {"1": [{"source": "s", "turns": turns}]}))


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
        ({"1": [question(q="Why?")]}, r"ID 1, entry 0 has 1 photos but 0 tags <\|extra_0\|> in its first question"),
        ({"1": [question(images=[1, 0])]}, r"has 2 photos but 1 tags"),
        ({"1": [question(images=[0, 1])]}, r'"images" must be a list of IDs that begins with 1'),
        ({"1": [question(images=[])]}, r'"images" must be a list of IDs that begins with 1'),
        ({"1": [question(images=1)]}, r'"images" must be a list'),
        ({"1": [question(images=[1, 5])]}, r"names the photo 5, which is not in the image map"),
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


def numbered_photos(count):
    return {ID: Photo(ID, f"train2017/{ID:012}.jpg", f"{ID:012}.jpg", Path("/x")) for ID in range(count)}


def entry(ID, text="Why?"):
    return Entry(() if ID is None else (ID,), "s", "s", (Turn(text, ("So.",)),))


def test_split_keeps_photos_whole_and_meets_the_share():
    photos = numbered_photos(2000)
    entries = [entry(ID, text) for ID in photos for text in ("1?", "2?")] + [entry(None, f"{n}?") for n in range(2000)]
    train, val = split_entries(photos, entries, 0.1)
    assert len(train) + len(val) == len(entries)
    assert {e.images for e in train if e.images}.isdisjoint({e.images for e in val})
    assert 150 < len({e.images for e in val}) < 250
    assert 150 < sum(not e.images for e in val) < 250


@given(st.lists(st.integers(0, 40)), st.floats(0, 0.99), st.integers(0, 40))
def test_split_moves_nothing_when_data_come_or_ids_change(IDs, fraction, shift):
    photos = numbered_photos(41)
    train, val = split_entries(photos, [entry(ID) for ID in IDs], fraction)
    more_train, more_val = split_entries(photos, [entry(ID) for ID in [*range(41), *IDs]], fraction)
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)
    moved = {(ID + shift) % 41: photo for ID, photo in photos.items()}
    _, moved_val = split_entries(moved, [entry((ID + shift) % 41) for ID in IDs], fraction)
    assert [photos[e.images[0]].key for e in val] == [moved[e.images[0]].key for e in moved_val]


def test_split_without_share():
    photos = numbered_photos(50)
    assert split_entries(photos, [entry(ID) for ID in photos], 0.0)[1] == []


def test_split_is_the_same_in_every_release():
    photos = numbered_photos(60)
    _, val = split_entries(photos, [entry(ID) for ID in photos], 0.05)
    assert [e.images[0] for e in val] == [2, 9]


def linked(*IDs):
    return Entry(IDs, "s", "s", (Turn(TAG * len(IDs) + "Same?", ("No.",)),))


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1), st.floats(0, 0.99))
def test_no_photo_is_on_both_sides(image_lists, fraction):
    photos = numbered_photos(31)
    entries = [linked(*IDs) for IDs in image_lists]
    try:
        train, val = split_entries(photos, entries, fraction)
    except UserError:  # all photos are one component
        reached = set(image_lists[0])
        for _ in image_lists:
            reached |= {ID for IDs in image_lists if reached & set(IDs) for ID in IDs}
        assert reached == {ID for IDs in image_lists for ID in IDs}
        return
    assert sorted(train + val, key=repr) == sorted(entries, key=repr)
    assert {ID for e in train for ID in e.images}.isdisjoint({ID for e in val for ID in e.images})


def test_the_first_key_of_linked_photos_decides():
    photos = numbered_photos(60)  # of which 2 and 9 are held out by themselves, see above
    singles = [entry(ID) for ID in photos]
    pairs = [linked(9, 10), linked(10, 11), linked(2, 1), linked(40, 40)]
    train, val = split_entries(photos, [*singles, *pairs], 0.05)
    assert val == [entry(9), entry(10), entry(11), linked(9, 10), linked(10, 11)]
    assert len(train) + len(val) == 64


def test_linked_photos_that_are_most_of_all_train():
    photos = numbered_photos(60)
    chain = [linked(ID, ID + 1) for ID in range(2, 59)]  # 2 is the key that decides, and would be held out
    train, val = split_entries(photos, [entry(0), entry(1), *chain], 0.05)
    assert train == [entry(0), entry(1), *chain]
    assert val == []
    with pytest.raises(UserError, match="'data.val_fraction' = 0.05: entries with several photos link all 58 photos"):
        split_entries(photos, chain, 0.05)
    assert split_entries(photos, chain, 0.0) == (chain, [])


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
