"""The public files of Flickr8k, Flickr8k-CN and DAQUAR become data sets that process_image.py reads without a loss."""

import json
from pathlib import Path

import pytest
from PIL import Image

import process_image
from benchmarks.public_data import convert_daquar, convert_flickr8k
from config import load_data
from dataset.records import read_records
from errors import UserError
from paths import REPO_ROOT


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def draw(folder, *names):
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


FLICKR8K = {
    "Flickr8k.token.txt": "1_a.jpg#0\tA dog # runs .\n1_a.jpg#1\tA brown dog .\n2_b.jpg#0\tTwo men .\n"
    "3_c.jpg#0\tA cat .\n",
    "flickr8kzhc.caption.txt": "1_a.jpg#zhc#0 一只狗在跑。\n1_a.jpg#zhc#1 棕色的狗。\n2_b.jpg#zhc#0 两个男人。\n",
    "Flickr_8k.trainImages.txt": "1_a.jpg\n2_b.jpg\n",
    "Flickr_8k.devImages.txt": "3_c.jpg\n",
    "Flickr_8k.testImages.txt": "",
}


def sources_of(config, changes):
    """The sources of a shipped config, with other folders."""
    sources = load_data(REPO_ROOT / "configs" / config).sources
    moved = [source.model_dump() for source in sources]
    for source in moved:
        source["images"] = str(changes["images"])
        source["annotations"] = str(changes["annotations"] / Path(source["annotations"]).name)
    return moved


def prepare(tmp_path, config, images):
    """Run process_image.py with a shipped config on the converted files; return (source, photo, question, answers)."""
    sources = sources_of(config, {"images": images, "annotations": tmp_path / "out"})
    files = {"data.image_map": str(tmp_path / "image_map.json"), "data.captions": str(tmp_path / "captions.json")}
    process_image.main(
        ["--config", str(REPO_ROOT / "configs" / config), f"data.sources={json.dumps(sources)}"]
        + [f"{key}={value}" for key, value in files.items()]
    )
    photos, entries = read_records(*(Path(file) for file in files.values()))
    return {(entry.source, photos[entry.images[0]].path.name, entry.turns[0].answers) for entry in entries}


def test_flickr8k_in_both_languages(tmp_path):
    write(tmp_path, FLICKR8K)
    draw(tmp_path / "photos", "1_a.jpg", "2_b.jpg", "3_c.jpg")
    convert_flickr8k(tmp_path, tmp_path / "out")
    assert prepare(tmp_path, "flickr8k.yaml", tmp_path / "photos") == {
        ("english", "1_a.jpg", ("A dog # runs .", "A brown dog .")),
        ("english", "2_b.jpg", ("Two men .",)),
        ("chinese", "1_a.jpg", ("一只狗在跑。", "棕色的狗。")),
        ("chinese", "2_b.jpg", ("两个男人。",)),
    }
    assert json.loads((tmp_path / "out" / "val_en.json").read_text())["annotations"] == [
        {"id": 0, "image_id": 0, "caption": "A cat ."}
    ]


def test_flickr8k_without_chinese(tmp_path):
    write(tmp_path, {name: text for name, text in FLICKR8K.items() if "zhc" not in name})
    convert_flickr8k(tmp_path, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "test_en.json",
        "train_en.json",
        "val_en.json",
    ]


DAQUAR = {
    "qa.37.raw.train.txt": "what is on the table_top in the image3 ?\ncup, night_stand\n"
    "how many chairs are there in this image image3 ?\n2\n"
    "what is the colour of the sofa image4 ?\nred\n",
    "qa.37.raw.test.txt": "what is on the right side of the picture in image12?\nlamp\n",
}


def test_daquar(tmp_path):
    write(tmp_path, DAQUAR)
    draw(tmp_path / "photos", "image3.png", "image4.png")
    convert_daquar(tmp_path, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in rows] == [
        ("image3.png", "What is on the table top?", "cup, night stand", "object"),
        ("image3.png", "How many chairs are there?", "2", "count"),
        ("image4.png", "What is the colour of the sofa?", "red", "colour"),
    ]
    (test,) = (tmp_path / "out" / "test.jsonl").read_text().splitlines()
    assert json.loads(test)["question"] == "What is on the right side of the picture?"
    assert prepare(tmp_path, "daquar.yaml", tmp_path / "photos") == {
        ("daquar", "image3.png", ("cup, night stand",)),
        ("daquar", "image3.png", ("2",)),
        ("daquar", "image4.png", ("red",)),
    }


@pytest.mark.parametrize(
    ("convert", "files", "sentence"),
    [
        (
            convert_flickr8k,
            FLICKR8K | {"Flickr8k.token.txt": "1_a.jpg A dog"},
            r"Flickr8k.token.txt, line 1: '1_a.jpg A dog'",
        ),
        (convert_daquar, DAQUAR | {"qa.37.raw.train.txt": "what is it ?\ncup\n"}, "line 1: no image at the end"),
        (convert_daquar, DAQUAR | {"qa.37.raw.test.txt": "what is in the image1 ?\n"}, "1 lines, but each question"),
        (convert_flickr8k, {}, "Flickr8k.token.txt is missing"),
    ],
)
def test_other_files_are_refused(tmp_path, convert, files, sentence):
    write(tmp_path, files)
    with pytest.raises(UserError, match=sentence):
        convert(tmp_path, tmp_path / "out")
