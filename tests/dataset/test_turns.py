"""Photos in any turn of a raw row, several in a turn: each is read back in its turn; what is unclear is rejected."""

import functools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.raw import process_coco
from dataset.records import read_records, write_records
from dataset.rows import Report

TAG = "<|extra_0|>"


def llava(image, *texts, **more):
    speakers = ["human", "gpt"] * (len(texts) // 2)
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | more


def turn(question, **more):
    return {"q": question, "a": "x"} | more


def only_entry(row):
    _, captions = process_coco([row], "p", 0, source="s")
    [[entry]] = captions.values()
    return entry


def test_photos_stand_in_the_turns_of_their_tags():
    names = ["b.jpg", "a.jpg", "b.jpg", "c.jpg"]
    texts = ["Say <image>.", "one", "<image><image>\n2?", "two", "3?", "three", "4?\n<image>", "four"]
    assert only_entry(llava(names, *texts)) == {
        "source": "s",
        "turns": [
            {"q": f"Say {TAG}.", "a": ["one"]},
            {"q": f"{TAG}{TAG}\n2?", "a": ["two"], "images": [1, 0]},
            {"q": "3?", "a": ["three"]},
            {"q": f"4?\n{TAG}", "a": ["four"], "images": [2]},
        ],
    }


def test_a_first_turn_without_photo():
    image_map, captions = process_coco([llava(["b.jpg", "a.jpg"], "Hello", "Hi", "<image> or <image>?", "a")], "p", 7)
    assert {key: photo["ID"] for key, photo in image_map.items()} == {"p/b.jpg": 7, "p/a.jpg": 8}
    [entry] = captions["7"]
    assert entry["images"] == []
    assert entry["turns"][1] == {"q": f"{TAG} or {TAG}?", "a": ["a"], "images": [7, 8]}


def test_images_is_another_name_of_image():
    plain = only_entry(llava(["a.jpg", "b.jpg"], "<image>1?", "1", "<image>2?", "2"))
    assert plain["turns"][1]["images"] == [1]
    assert only_entry(llava(None, "<image>1?", "1", "<image>2?", "2", images=["a.jpg", "b.jpg"])) == plain
    assert only_entry(llava("a.jpg", "1?", "1", images=["./a.jpg"]))["q"] == f"{TAG}\n1?"


def test_turns_with_photos_of_their_own():
    row = {
        "image": "a.jpg",
        "type": "t",
        "turns": [
            {"question": "1?", "answer": ["one", "eins"]},
            {"q": "2?", "a": "two", "images": ["b.jpg", "a.jpg"], "type": "count"},
            {"q": "<image>3?", "a": "three", "image": "c.jpg"},
            {"q": "4?", "a": "four"},
        ],
    }
    assert only_entry(row) == {
        "source": "s",
        "type": "t",
        "turns": [
            {"q": f"{TAG}\n1?", "a": ["one", "eins"]},
            {"q": f"{TAG}{TAG}\n2?", "a": ["two"], "type": "count", "images": [1, 0]},
            {"q": f"{TAG}3?", "a": ["three"], "images": [2]},
            {"q": "4?", "a": ["four"]},
        ],
    }


def test_turns_that_share_the_photos_of_their_row():
    row = {"images": ["a.jpg", "b.jpg"], "turns": [turn("<image>1?"), turn("2? <image>")]}
    assert only_entry(row) == only_entry(llava(["a.jpg", "b.jpg"], "<image>1?", "x", "2? <image>", "x"))
    assert only_entry({"turns": [turn("1?", image="a.jpg")]})["q"] == f"{TAG}\n1?"


@given(st.lists(st.lists(st.sampled_from(["a.jpg", "b.jpg", "c.jpg"]), max_size=3), min_size=1, max_size=4))
def test_every_photo_is_read_back_in_its_turn(tmp_path_factory, lists):
    """From a LLaVA row, and from the same row with photos named by turn, to the entries that training reads."""
    folder = tmp_path_factory.getbasetemp()
    paths = folder / "image_map.json", folder / "captions.json"
    questions = ["<image>" * len(names) + "?" for names in lists]
    texts = [text for question in questions for text in (question, "x")]
    by_turn = {"turns": [turn(question, images=names) for question, names in zip(questions, lists, strict=True)]}
    report = Report("s")
    rows = [llava([name for names in lists for name in names], *texts), by_turn]
    image_map, captions = process_coco(rows, "p", 0, report=report)
    assert (report.kept, report.tags_added) == (2, 0)
    write_records(image_map, captions, *paths)
    photos, entries = read_records(*paths)
    assert [[[photos[ID].image_file for ID in t.images] for t in e.turns] for e in entries] == [lists, lists]


def test_a_bad_photo_of_a_later_turn_drops_the_row():
    rows = [llava(["a.jpg", "bad.jpg"], "<image>1?", "1", "<image>2?", "2"), llava("b.jpg", "?", "x")]
    report, asked = Report("s"), []

    def check(paths):
        asked.extend(paths)
        return {"p/bad.jpg": ("photo not found", "p/bad.jpg")}

    image_map, captions = process_coco(rows, "p", 0, check=check, report=report)
    assert asked == ["p/a.jpg", "p/bad.jpg", "p/b.jpg"]
    assert (list(image_map), list(captions)) == (["p/b.jpg"], ["0"])
    assert report.dropped["photo not found"]["examples"] == ["row 1: p/bad.jpg"]


@pytest.mark.parametrize("field", ["type", "image"])
def test_deep_nesting_is_no_traceback(field):
    deep = functools.reduce(lambda inner, _: [inner], range(sys.getrecursionlimit()), "x")
    report = Report("s")
    process_coco([llava("a.jpg", "?", "x") | {field: deep}], "p", 0, report=report)
    assert report.kept + len(report.rejected) == 1


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (
            llava(["a.jpg", "b.jpg"], "1?", "1", "<image>2?", "2"),
            "number of <image> tags is not that of photos",
            "1 tags, 2 photos",
        ),
        (
            llava(["a.jpg", "b.jpg"], "<image>1?", "1", "<image><image>2?", "2"),
            "number of <image> tags is not that of photos",
            "3 tags, 2 photos",
        ),
        (llava("a.jpg", "1?", "1", f"{TAG}2?", "2"), f"text holds a literal {TAG}", f"{TAG}2?"),
        (
            llava("a.jpg", "?", "1", images=["b.jpg"]),
            "image and images name different photos",
            "['a.jpg', ['b.jpg']]",
        ),
        ({"turns": []}, "turns is not a list of objects", "[]"),
        ({"turns": [turn("1?"), 2]}, "turns is not a list of objects", "2]"),
        ({"turns": [turn("1?"), {"q": "2?"}]}, "no answer", "None"),
        ({"turns": [turn("1?"), turn("2?", image="../b.jpg")]}, "photo path leaves the image folder", "../b.jpg"),
        (
            {"image": "a.jpg", "turns": [turn("1?", image="b.jpg")]},
            "row and first turn both name photos",
            "[['a.jpg'], ['b.jpg']]",
        ),
        (
            {"turns": [turn("<image>1?", image="a.jpg"), turn("<image>2?", image=["a.jpg", "b.jpg"])]},
            "number of <image> tags is not that of photos",
            "turn 2: 1 tags, 2 photos",
        ),
        (
            {"turns": [turn("1?", image="a.jpg"), turn("<image>2?")]},
            "number of <image> tags is not that of photos",
            "turn 2: 1 tags, 0 photos",
        ),
        ({"turns": [turn("1?"), turn(f"{TAG}2?", image="a.jpg")]}, f"text holds a literal {TAG}", f"{TAG}2?"),
    ],
)
def test_rejected_with_reason(row, reason, detail):
    report = Report("s")
    _, captions = process_coco([llava("z.jpg", "Why?", "So."), row], "p", 0, report=report)
    assert list(captions) == ["0"]
    assert (report.rows, report.kept) == (2, 1)
    [(_, found, found_detail)] = report.rejected
    assert found == reason
    assert detail in found_detail
