"""Photos in tar files give the data set, the pixels and the faults of the same photos as files of their own."""

import io
import json
import os
import re
import sys
import tarfile
import textwrap
from types import SimpleNamespace

import numpy as np
import orjson
import pytest
from PIL import Image

import process_image
from config import Data
from dataset.photo_check import photo_check
from dataset.records import read_records
from errors import UserError, shortened
from paths import REPO_ROOT
from tests.tiny import tiny_config
from training.loop import Trainer
from visual.photo import load_image, photo_size
from visual.shard import Member, member_of, without_place

LONG = "很长的文件夹名/" * 12  # more bytes than a tar header has for a name


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def pack(file, files):
    with tarfile.open(file, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def prepare(folder, **data):
    source = {"name": "packed", "format": "webdataset", "annotations": str(folder), "images": str(folder)}
    return process_image.process_sources(Data(sources=[source], **data))


DIALOGUE = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "碎片 shards"
    folder.mkdir()
    pack(folder / "part-1.tar", {
        "a/0.png": picture(0), "a/0.json": DIALOGUE,
        "a/1.txt": "一只猫\n".encode("utf-8-sig"), "a/1.png": picture(1),
        f"{LONG}2.png": picture(2), f"{LONG}2.json": {"question": "Which?", "answer": "red", "type": "colour"},
    })  # fmt: skip
    pack(folder / "part-0.tar", {
        "3.png": picture(3), "3.json": {"caption": ["A dog.", "A small dog."], "image": "other.jpg"},
        "4.0.png": picture(4), "4.1.PNG": picture(5), "4.json": {"turns": [{"question": "Same?", "answer": "no"}]},
    })  # fmt: skip
    return folder


def test_samples_become_records(shards):
    image_map, captions, [report] = prepare(shards)
    folder = shards.name
    assert [*image_map] == [
        f"{folder}/part-0.tar/3.png", f"{folder}/part-0.tar/4.0.png", f"{folder}/part-0.tar/4.1.PNG",
        f"{folder}/part-1.tar/a/0.png", f"{folder}/part-1.tar/a/1.png", f"{folder}/part-1.tar/{LONG}2.png",
    ]  # fmt: skip
    assert (report.rows, report.kept, report.photos) == (5, 5, 6)
    assert [(entry["q"].replace("<|extra_0|>", ""), entry["a"]) for entry in captions["3"]] == [("\nWhat?", ["A cat."])]
    assert captions["0"][0]["a"] == ["A dog.", "A small dog."]
    assert captions["0"][0]["q"].replace("<|extra_0|>", "") in (
        "What does this picture show?",
        "What is in this picture?",
    )
    assert captions["1"][0]["images"] == [1, 2]
    assert captions["4"][0]["a"] == ["一只猫"]
    assert "这幅图像" in captions["4"][0]["q"]
    assert (captions["5"][0]["a"], captions["5"][0]["type"]) == (["red"], "colour")
    for number, photo in zip((3, 4, 5, 0, 1, 2), image_map.values(), strict=True):
        assert load_image(photo["path"]).tobytes() == Image.open(io.BytesIO(picture(number))).tobytes()
        assert photo_size(photo["path"]) == (30, 24)
        assert photo["path"] == f"{shards}/{photo['image_file']}@{photo['path'].rpartition('@')[2]}"


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_that_of_loose_photos(workshop, tmp_path, cached):
    """The same photos and entries, in the same order: the same weights, bit for bit."""
    photos, entries = read_records(workshop / "image_map.json", workshop / "captions.json")
    captions = json.loads((workshop / "captions.json").read_text(encoding="utf-8"))
    image_map = json.loads((workshop / "image_map.json").read_text(encoding="utf-8"))
    pack(tmp_path / "all.tar", {f"{ID}.png": photo.path.read_bytes() for ID, photo in photos.items()})
    with tarfile.open(tmp_path / "all.tar") as tar:
        places = {info.name: Member(str(tmp_path / "all.tar"), info.name, info.offset_data, info.size) for info in tar}
    for photo in image_map.values():
        photo["path"] = places[f"{photo['ID']}.png"].path
    (tmp_path / "image_map.json").write_text(json.dumps(image_map), encoding="utf-8")
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    assert entries
    weights = []
    for folder in (workshop, tmp_path):
        data = {"image_map": str(folder / "image_map.json"), "captions": str(folder / "captions.json")}
        data |= {"cache_features": cached, "feature_cache": str(tmp_path / f"features {folder.name}")}
        train = {"max_steps": 2, "workers": 1, "output_dir": str(tmp_path / f"run {folder.name}")}
        checkpoint = Trainer(tiny_config(workshop, data=data, train=train)).run()
        weights.append((checkpoint / "feature_proj.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_tar_s_own_packing_is_read(tmp_path):
    """`tar -cf part.tar .` puts "./" before each name, and folders among the files."""
    loose = tmp_path / "loose" / LONG
    loose.mkdir(parents=True)
    (loose / "0.png").write_bytes(picture(0))
    (loose / "0.txt").write_text("cat", encoding="utf-8")
    for kind, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        folder = tmp_path / kind
        folder.mkdir()
        with tarfile.open(folder / "part.tar", "w", format=form) as tar:
            tar.add(tmp_path / "loose", ".")
        image_map, _, [report] = prepare(folder, check_images="open")
        assert report.dropped == {}
        assert [*image_map] == [f"{kind}/part.tar/{LONG}0.png"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"0.png": picture(0)}, "sample without a text"),
        ({"0.json": DIALOGUE}, "sample without a photo"),
        ({"0.png": picture(0), "0.json": b"{"}, "text of the sample is not JSON"),
        ({"0.png": picture(0), "0.json": b"[]"}, "text of the sample is not a JSON object"),
        ({"0.png": picture(0), "0.txt": b"\xff"}, "text of the sample is not UTF-8"),
        ({"0.png": picture(0), "0.txt": b" "}, "no answer"),
        ({"0.png": b"", "0.txt": b"cat"}, "photo file is empty"),
        ({"0.png": b"no photo", "0.txt": b"cat"}, "photo cannot be decoded"),
        ({"../0.png": picture(0), "../0.txt": b"cat"}, "photo path leaves the shard"),
        ({"x.tar/0.png": picture(0), "x.tar/0.txt": b"cat"}, "photo in a folder whose name ends in .tar"),
    ],
)
def test_unusable_samples_are_rejected(shards, files, reason):
    pack(shards / "part-2.tar", files)
    _, _, [report] = prepare(shards, check_images="open")
    assert (report.rows, report.kept) == (6, 5)
    assert [*report.dropped] == [reason]
    [(part, _, _)] = report.rejected
    assert (part.file, part.place) == (str(shards / "part-2.tar"), f"sample {next(iter(files)).rpartition('.')[0]}")


def test_names_in_another_encoding_are_rejected(shards):
    """GBK, as `tar` on a Chinese Windows writes it; the report and the rejected rows say the bytes."""
    names = [name.encode("gbk").decode("utf-8", "surrogateescape") for name in ("照片.png", "照片.txt")]
    pack(shards / "part-2.tar", dict(zip(names, (picture(0), b"cat"), strict=True)))
    image_map, captions, [report] = prepare(shards, check_images="open")
    assert report.dropped["file name of the sample is not UTF-8"]["count"] == 1
    assert (report.rows, report.kept) == (6, 5)
    [line] = report.rejected_lines()
    assert json.loads(line)["place"] == "sample \\xd5\\xd5\u01ac"  # the last two bytes are UTF-8 by chance
    for value in (image_map, captions, report.figures()):
        orjson.dumps(value)  # refuses a name that is not Unicode


def test_names_in_unusual_forms_are_read(tmp_path):
    for number, name in enumerate(["/data/a.png", "d//b.png", "d\\c.png", "././d.png", f"./{LONG}/e.png"]):
        pack(tmp_path / f"part-{number}.tar", {name: picture(number), name.replace(".png", ".txt"): b"cat"})
    image_map, _, [report] = prepare(tmp_path, check_images="open")
    assert report.dropped == {}
    names = [photo["image_file"].partition("/")[2] for photo in image_map.values()]
    assert names == ["data/a.png", "d/b.png", "d/c.png", "d.png", f"{LONG}e.png"]
    for number, photo in enumerate(image_map.values()):
        assert load_image(photo["path"]).tobytes() == Image.open(io.BytesIO(picture(number))).tobytes()


def test_shards_that_cannot_be_read(shards, tmp_path):
    source = {"name": "s", "format": "webdataset", "annotations": str(shards), "images": str(tmp_path)}
    apart = Data(sources=[source])
    with pytest.raises(UserError, match="give .* as 'images' too"):
        process_image.process_sources(apart)
    with pytest.raises(UserError, match=r"data\.sources\.0\.annotations.*is not a folder"):
        prepare(shards / "part-0.tar", check_images="none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file that ends in \.tar: is 'format' right"):
        prepare(tmp_path / "empty")
    with tarfile.open(shards / "part-2.tar", "w:gz") as tar:
        tar.add(shards / "part-0.tar", "0.png")
    with pytest.raises(UserError, match=r"part-2\.tar: damaged, or not an uncompressed tar file"):
        prepare(shards)


def test_a_shard_that_ends_too_soon_is_found_before_training(shards):
    whole = (shards / "part-1.tar").read_bytes()
    (shards / "part-1.tar").write_bytes(whole[: whole.index(picture(2)) + 50])
    with pytest.raises(
        UserError, match=r"part-1\.tar: damaged, or not an uncompressed tar file \(unexpected end of data\)"
    ):
        prepare(shards)


def test_a_photo_that_its_shard_no_longer_holds_is_rejected(shards):
    image_map, _, _ = prepare(shards)
    paths = [photo["path"] for photo in image_map.values()]
    cut = member_of(paths[-1])
    os.truncate(cut.shard, cut.start + cut.size - 1)
    assert photo_check("exists", "s")(paths) == {paths[-1]: ("photo is cut off in its shard", shortened(paths[-1]))}
    os.remove(cut.shard)
    assert photo_check("exists", "s")(paths[-1:]) == {paths[-1]: ("photo not found", shortened(paths[-1]))}


def test_a_shard_that_changed_is_said(shards):
    image_map, _, _ = prepare(shards)
    path = image_map[f"{shards.name}/part-0.tar/4.0.png"]["path"]
    member = member_of(path)
    whole = (shards / "part-0.tar").read_bytes()
    pack(shards / "part-0.tar", {"0.txt": b"x" * 700, "4.0.png": picture(4)})
    with pytest.raises(UserError, match=r"4\.0\.png@\d+\+\d+: the shard has .* run process_image\.py again"):
        load_image(path)
    (shards / "part-0.tar").write_bytes(whole[: member.start + 50])
    with pytest.raises(UserError, match="it was cut off, fetch it again"):
        load_image(path)
    (shards / "part-0.tar").write_bytes(whole[: member.start - 600])
    with pytest.raises(UserError, match="the shard has no file there any more"):
        load_image(path)
    (shards / "part-0.tar").unlink()
    with pytest.raises(UserError, match="photo not found: .*part-0.tar"):
        load_image(path)


def test_paths_of_files_stay_paths_of_files(tmp_path):
    for path in ("a/b.jpg", "a.tar/b.jpg", "a.tar@1+2", "a.tar/b@1+x", "b@1+2"):
        assert member_of(path) is None
        assert without_place(path) == path
    assert member_of("x/a.tar/b/c@d.jpg@12+34") == Member("x/a.tar", "b/c@d.jpg", 12, 34)
    assert without_place("x/a.tar/b/c@d.jpg@12+34") == "x/a.tar/b/c@d.jpg"


def parquet_recipe(page):
    """The lines of a page that make a shard of a parquet file."""
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^    .*\n)*^    import .*pyarrow\.parquet\n(?:^    .*\n)+", text, re.MULTILINE)
    return textwrap.dedent(block)


@pytest.mark.parametrize("library", ["pyarrow", "stand-in"])
def test_the_docs_lines_make_a_shard_of_a_parquet_file(tmp_path, monkeypatch, library):
    jpegs = [io.BytesIO() for _ in range(2)]
    for number, jpeg in enumerate(jpegs):
        Image.open(io.BytesIO(picture(number))).save(jpeg, "JPEG")
    rows = [
        {"image": {"bytes": jpeg.getvalue(), "path": None}, "question": f"Which {number}?", "answer": "红色"}
        for number, jpeg in enumerate(jpegs)
    ]
    if library == "pyarrow":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part-00000.parquet")
    else:  # the rest of the lines is tested where the library is missing, too
        table = SimpleNamespace(to_pylist=lambda: rows)
        parquet = SimpleNamespace(read_table={"part-00000.parquet": table}.__getitem__)
        monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.chdir(tmp_path)
    recipe = parquet_recipe("docs/scaling.md")
    assert recipe == parquet_recipe("docs/scaling_zh.md")
    exec(recipe, {})
    image_map, captions, [report] = prepare(tmp_path)
    assert (report.rows, report.kept, report.photos) == (2, 2, 2)
    assert [entry["a"] for [entry] in captions.values()] == [["红色"]] * 2
    assert [entry["q"].replace("<|extra_0|>", "").strip() for [entry] in captions.values()] == ["Which 0?", "Which 1?"]
    for photo, row in zip(image_map.values(), rows, strict=True):
        assert load_image(photo["path"]).tobytes() == Image.open(io.BytesIO(row["image"]["bytes"])).tobytes()
