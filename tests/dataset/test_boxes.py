"""Questions about a boxed part of a photo: from a raw row to the pixels that training reads."""

import json

import pytest
import torch
from PIL import Image

from dataset.raw import process_ali, process_captions, process_coco
from dataset.records import photos_of, read_records, split_entries, write_records
from dataset.rows import Report
from errors import UserError
from model.processor import Processor
from training.feature_cache import PixelLoader
from visual.region import Region
from visual.transform import ImageTransform

TAG = "<|extra_0|>"
BOX = [10, 5, 30, 25]


def records(folder, rows):
    paths = folder / "image_map.json", folder / "captions.json"
    write_records(*process_coco(rows, folder, 0, source="s"), *paths)
    return read_records(*paths)


def shown(photos, turn):
    return [(photos[ID].image_file, photos[ID].box) for ID in turn.images]


@pytest.mark.parametrize(
    ("row", "questions", "pictures"),
    [
        (
            {"image": "a.jpg", "box": BOX, "question": "It?", "answer": "x"},
            [f"{TAG}{TAG}\nIt?"],
            [[("a.jpg", None), ("a.jpg", tuple(BOX))]],
        ),
        (
            {"image": ["a.jpg", "b.jpg"], "box": [0.5, 0.0, 1.0, 1.0], "q": "In <image> or <image>, it?", "a": "x"},
            [f"In {TAG} or {TAG}{TAG}, it?"],
            [[("a.jpg", None), ("b.jpg", None), ("b.jpg", (0.5, 0.0, 1.0, 1.0))]],
        ),
        (
            {"image": "a.jpg", "turns": [
                {"q": "1?", "a": "x"}, {"q": "It?", "a": "x", "box": BOX}, {"q": "3?", "a": "x"}]},
            [f"{TAG}\n1?", f"{TAG}\nIt?", "3?"],
            [[("a.jpg", None)], [("a.jpg", tuple(BOX))], []],
        ),
        (
            {"turns": [{"q": "1?", "a": "x", "image": "a.jpg"}, {"q": "It?", "a": "x", "image": "b.jpg", "box": BOX}]},
            [f"{TAG}\n1?", f"{TAG}{TAG}\nIt?"],
            [[("a.jpg", None)], [("b.jpg", None), ("b.jpg", tuple(BOX))]],
        ),
        (
            {"image": "a.jpg", "box": BOX, "conversations": [
                {"from": "human", "value": "<image>\nIt?"}, {"from": "gpt", "value": "x"},
                {"from": "human", "value": "2?"}, {"from": "gpt", "value": "y"}]},
            [f"{TAG}{TAG}\nIt?", "2?"],
            [[("a.jpg", None), ("a.jpg", tuple(BOX))], []],
        ),
        (
            {"image": "a.jpg", "box": BOX, "caption": [
                {"from": "human", "value": "It?"}, {"from": "gpt", "value": "x"}]},
            [f"{TAG}{TAG}\nIt?"],
            [[("a.jpg", None), ("a.jpg", tuple(BOX))]],
        ),
    ],
)  # fmt: skip
def test_the_part_follows_the_photos_of_its_turn(tmp_path, row, questions, pictures):
    photos, [entry] = records(tmp_path, [row])
    assert [turn.question for turn in entry.turns] == questions
    assert [shown(photos, turn) for turn in entry.turns] == pictures


@pytest.mark.parametrize("process", [process_ali, process_captions, process_coco])
def test_a_caption_is_of_the_part(process):
    """In every format whose rows may be captions, those of a webdataset among them."""
    image_map, captions = process([{"image": "a.jpg", "box": BOX, "caption": "A red dot."}], "p", 0)
    assert [photo.get("box") for photo in image_map.values()] == [None, BOX]
    [entry] = captions["0"]
    assert (entry["images"], entry["a"], entry["q"].count(f"{TAG}{TAG}")) == ([0, 1], ["A red dot."], 1)


def test_a_part_has_one_key_in_all_rows_and_sources(tmp_path):
    row = {"image": "a.jpg", "box": BOX, "question": "It?", "answer": "x"}
    pixels = row | {"box": [0, 0, 1, 1]}
    fractions = row | {"box": [0.0, 0.0, 1.0, 1.0]}
    image_map, _ = process_coco([row, row, pixels, fractions], "p", 0)
    assert list(image_map) == ["p/a.jpg", "p/a.jpg#10,5,30,25", "p/a.jpg#0,0,1,1", "p/a.jpg#0.0,0.0,1.0,1.0"]
    assert {photo["path"] for photo in image_map.values()} == {"p/a.jpg"}
    again, captions = process_coco([row], "p", 4, image_map=image_map)
    assert again == {}
    assert captions["0"][0]["images"] == [0, 1]


def test_training_reads_the_part_through_the_one_transform(tmp_path):
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "a.png")
    photos, [entry] = records(tmp_path, [{"image": "a.png", "box": BOX, "question": "It?", "answer": "x"}])
    transform = ImageTransform(_processor())
    load = PixelLoader(Processor(None, transform, _Chat()))
    whole, part = (load(photos[ID]) for ID in entry.images)
    image = Image.open(tmp_path / "a.png")
    assert torch.equal(whole[0], transform(image))
    assert torch.equal(part[0], transform(image.crop(tuple(BOX))))
    assert photos[1].picture == Region(photos[0].path, tuple(BOX))


class _Chat:
    plan = type("Plan", (), {"tile_rows": 0, "tile_columns": 0})


def _processor():
    from compat import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 28, "width": 28})


def test_a_part_is_on_the_side_of_its_photo(tmp_path):
    rows = [{"image": f"{number}.jpg", "question": "?", "answer": "x"} for number in range(200)]
    boxed = [row | {"box": BOX} for row in rows[::2]]
    photos, plain = records(tmp_path, rows)
    held_out = {photos[entry.images[0]].key for entry in split_entries(photos, plain, 0.3)[1]}
    photos, both = records(tmp_path, rows + boxed)
    train, val = split_entries(photos, both, 0.3)
    assert {photos[entry.images[0]].key for entry in val} == held_out
    assert not {photos[ID].path for entry in train for ID in entry.images} & {
        photos[ID].path for entry in val for ID in entry.images
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg", "box": [1, 2, 3]}, "wrong box"),
        ({"image": "a.jpg", "box": [5, 5, 5, 9]}, "wrong box"),
        ({"image": "a.jpg", "box": "rubbish", "caption": "x"}, "wrong box"),
        ({"box": BOX}, "box before the first photo"),
        ({"image": "a.jpg", "box": BOX, "conversations": [
            {"from": "human", "value": "1?"}, {"from": "gpt", "value": "x"},
            {"from": "human", "value": "<image>2?"}, {"from": "gpt", "value": "y"}]}, "box before the first photo"),
    ],
)  # fmt: skip
def test_an_unusable_box_drops_its_row(row, reason):
    report = Report("s")
    asked = {} if "caption" in row else {"question": "?", "answer": "x"}
    process_coco([asked | row], "p", 0, report=report)
    assert list(report.dropped) == [reason]


def test_a_wrong_box_in_the_image_map_is_named(tmp_path):
    content = {"a.jpg": {"ID": 0, "image_file": "a.jpg", "path": "a.jpg", "box": [1, 2]}}
    with pytest.raises(UserError, match=r"'a\.jpg' has a wrong box .*x0,y0,x1,y1"):
        photos_of(json.loads(json.dumps(content)), tmp_path / "image_map.json")
