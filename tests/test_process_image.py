"""The script from raw annotation files to the two JSON files: counts, drops, exit status, same bytes every time."""

import json
import subprocess
import sys

import pytest
import yaml

import process_image
from dataset.records import read_records
from dataset.rows import Report
from paths import REPO_ROOT
from process_image import too_many_rejected
from tests.raw_world import llava, write_json

TAG = "<|extra_0|>"


def test_names_of_the_report():
    assert {"process_ali", "process_coco", "read_json"} <= set(dir(process_image))


def test_two_formats_become_one_data_set(world, capsys):
    world.run()
    assert world.table(capsys) == {
        "ali": [3, 3, 3, 3, 0],
        "reasoning": [3, 3, 2, 3, 0],
        "detail": [2, 2, 1, 2, 0],
        "total": [8, 8, 6, 8, 0],
    }
    photos, entries = world.read()
    assert [photo.key for photo in photos.values()] == [
        *(f"照片 one/{number}.jpg" for number in range(3)),
        *(f"train2017/{number}.jpg" for number in range(3)),
    ]
    assert all(photo.path.is_file() for photo in photos.values())
    answers = {(photos[entry.images[0]].key, entry.source, *entry.turns[0].answers) for entry in entries}
    assert answers == {
        *((f"照片 one/{number}.jpg", "ali", f"第{number}张", "一张照片") for number in range(3)),
        ("train2017/0.jpg", "reasoning", "r0"),
        ("train2017/1.jpg", "reasoning", "r1"),
        ("train2017/2.jpg", "detail", "d2"),
        ("train2017/0.jpg", "detail", "d0"),
    }
    on_photo_3 = [(entry.turns[0].question, entry.turns[0].answers) for entry in entries if entry.images == (3,)]
    assert on_photo_3 == [
        (f"{TAG}\nwhy 0?", ("r0",)),
        (f"{TAG}\nwhy 0?", ("r0",)),
        (f"{TAG}\nwhat 0?", ("d0",)),
    ]


def test_twice_gives_the_same_bytes(world):
    world.run()
    first = world.written()
    world.run()
    assert set(first) == {"image_map.json", "captions.json", "process_report.json", "rejected.jsonl"}
    assert first["rejected.jsonl"] == b""
    assert world.written() == first
    world.run("data.seed=1")
    assert world.written()["captions.json"] != first["captions.json"]


def test_check_writes_nothing(world, capsys):
    world.run("--check")
    assert world.written() == {}
    assert world.table(capsys)["total"] == [8, 8, 6, 8, 0]


def break_photos(world):
    (world.photos[0] / "1.jpg").unlink()
    (world.photos[1] / "0.jpg").write_bytes(b"")
    cut = world.photos[1] / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])


@pytest.mark.parametrize(("mode", "kept"), [("none", [3, 3, 2]), ("exists", [2, 1, 1]), ("open", [2, 0, 1])])
def test_bad_photos(world, capsys, mode, kept):
    break_photos(world)
    if 0 in kept:
        with pytest.raises(
            ValueError, match="no row was kept of reasoning, see the reasons above; nothing was written"
        ):
            world.run(f"data.check_images={mode}")
        assert world.written() == {}
    else:
        world.run(f"data.check_images={mode}")
        assert sorted(world.read()[0]) == list(range(len(world.read()[0])))
    output = capsys.readouterr().out
    assert [int(line.split()[2]) for line in output.splitlines()[1:4]] == kept
    assert ("ali: dropped 1 rows, photo not found; for example\n    row 2: " in output) == (mode != "none")
    assert ("reasoning: dropped 2 rows, photo file is empty; for example\n    row 1: " in output) == (mode != "none")
    assert ("1.jpg: damaged or cut off" in output) == (mode == "open")


def test_report_file(world):
    break_photos(world)
    world.run()
    reports = json.loads((world.output / "process_report.json").read_text(encoding="utf-8"))
    assert [report["source"] for report in reports] == ["ali", "reasoning", "detail"]
    assert reports[1]["dropped"]["photo file is empty"]["count"] == 2
    for report in reports:
        assert report["rows"] == report["kept"] + sum(reason["count"] for reason in report["dropped"].values())


def test_a_failed_run_leaves_the_old_files(world):
    world.run()
    before = world.written()
    write_json(world.annotations["detail"], [])
    with pytest.raises(ValueError, match="no row was kept of detail"):
        world.run()
    assert world.written() == before


def test_rejected_rows_are_written_whole(world):
    break_photos(world)
    row = llava("3.jpg", "why 3?", "\u200b")
    rows = json.loads(world.annotations["detail"].read_bytes())
    write_json(world.annotations["detail"], [row, *rows])
    world.run()
    ali, reasoning, detail = (str(world.annotations[name]) for name in ("ali", "reasoning", "detail"))
    assert world.rejected() == [
        ("ali", ali, "row 2", "photo not found", {"image_id": "1.jpg", "caption": ["第1张", "一张照片"]}),
        ("reasoning", reasoning, "row 1", "photo file is empty", llava("0.jpg", "why 0?", "r0")),
        ("reasoning", reasoning, "row 3", "photo file is empty", llava("0.jpg", "why 0?", "r0")),
        ("detail", detail, "row 1", "no answer", row),
        ("detail", detail, "row 3", "photo file is empty", llava("0.jpg", "what 0?", "d0")),
    ]
    (world.photos[0] / "1.jpg").touch()
    world.run()
    assert len(world.rejected()) == 5
    before = world.written()
    world.run("--check")
    assert world.written() == before


def test_deeply_nested_row_is_written_too(world):
    row = []
    for _ in range(1000):
        row = [row]
    world.annotations["detail"].write_text(f"[{json.dumps(llava('0.jpg', 'q', 'a'))}, {'[' * 1000 + ']' * 1000}]")
    world.run()
    [line] = (world.output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert line.endswith(f'"row": {"[" * 1000 + "]" * 1000}}}')


def test_too_many_rejected(world):
    world.run()
    before = world.written()
    rows = [llava(f"{number % 3}.jpg", f"why {number}?", "r") for number in range(97)]
    write_json(world.annotations["reasoning"], [*rows, 1, llava("0.jpg", "?", ""), llava("1.jpg", "?", " ")])
    world.run("data.max_rejected=0.03")
    allowed = world.written()
    assert len(world.rejected()) == 3
    write_json(world.annotations["reasoning"], [*rows, 1, 2, llava("0.jpg", "?", ""), llava("1.jpg", "?", " ")])
    sentence = (
        r"source 'reasoning': 4 of 101 rows \(3\.96%\) are rejected, mostly: row is not an object \(2\), no answer "
        r"\(2\)\. That is more than data\.max_rejected = 0\.03: mend the rows, or allow it with "
        r"data\.max_rejected=0\.04\."
    )
    with pytest.raises(ValueError, match=sentence + " --check: nothing was written"):
        world.run("data.max_rejected=0.03", "--check")
    assert world.written() == allowed
    with pytest.raises(ValueError, match=sentence + r" Only .*rejected\.jsonl and .*process_report\.json were written"):
        world.run("data.max_rejected=0.03")
    after = world.written()
    assert {name for name in after if after[name] != allowed[name]} == {"rejected.jsonl", "process_report.json"}
    assert len(world.rejected()) == 4
    assert before != after
    world.run("data.max_rejected=0.04")
    assert world.written()["captions.json"] == allowed["captions.json"]


def test_one_percent_is_the_default(world):
    del world.data["max_rejected"]
    world.write_config()
    rows = [llava(f"{number % 3}.jpg", "why?", "r") for number in range(99)]
    write_json(world.annotations["reasoning"], [*rows, 1])
    world.run()
    write_json(world.annotations["reasoning"], [*rows[1:], 1])
    with pytest.raises(ValueError, match="'reasoning': 1 of 99 rows"):
        world.run()


def test_share_that_equals_the_limit_is_allowed():
    report = Report("s", rows=100, kept=71)  # 0.29 * 100 is less than 29 in floating point
    assert too_many_rejected([report], 0.29) == ""
    assert too_many_rejected([report, Report("none")], 0.28).endswith("data.max_rejected=0.29.")


def test_encoding_and_blank_answers_are_told(world, capsys):
    rows = json.loads(world.annotations["ali"].read_bytes())
    rows[0]["caption"] += ["", "\u200b"]
    world.annotations["ali"].write_bytes(json.dumps(rows, ensure_ascii=False).encode("gb18030"))
    world.run()
    output = capsys.readouterr().out
    assert f"ali: {world.annotations['ali']} is read as GB18030\n" in output
    assert "ali: 2 blank answers left out of rows that have others\n" in output
    report = json.loads((world.output / "process_report.json").read_text(encoding="utf-8"))[0]
    assert report["encodings"] == {str(world.annotations["ali"]): "GB18030"}
    assert report["blank_answers"] == 2
    assert world.read()[1][0].turns[0].answers == ("第0张", "一张照片")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, r"'data\.sources' is empty: name at least one source"),
        ({"annotations": "alii.json"}, r"'data\.sources\.0\.annotations': file not found: .*Did you mean .*ali\.json"),
        ({"images": "照片 two"}, r"'data\.sources\.0\.images': folder not found: .*Did you mean .*照片 one"),
        ({"captions": "image_map.json"}, r"'data\.image_map' and 'data\.captions' are both .*image_map\.json"),
    ],
)
def test_wrong_config(world, change, message):
    [(key, value)] = change.items()
    if key in ("annotations", "images"):
        world.data["sources"][0][key] = str(world.folder / value)
    else:
        world.data[key] = value if key == "sources" else str(world.output / value)
    world.write_config()
    with pytest.raises(ValueError, match=message):
        world.run()


def run_script(*arguments):
    command = [sys.executable, str(REPO_ROOT / "process_image.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)


def test_as_a_command(world):
    done = run_script("--config", world.config, "data.check_images=exists")
    assert done.returncode == 0, done.stderr
    assert "written: " in done.stdout
    assert len(world.read()[1]) == 8


def test_wrong_json_ends_with_one_sentence(world):
    world.annotations["detail"].write_text('[\n{"image": "0.jpg",,}]', encoding="utf-8")
    done = run_script("--config", world.config)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {world.annotations['detail']}: not valid JSON at line 2, column 19")
    assert world.written() == {}


def test_real_photos(samples_folder, tmp_path, capsys):
    coco = samples_folder / "coco"
    ali = samples_folder / "ai_challenger"
    files = {
        "ali": (
            "ai_challenger",
            ali / "caption_train_annotations_20170902.json",
            ali / "caption_train_images_20170902",
        ),
        "reasoning": ("llava", coco / "complex_reasoning_77k.json", coco / "train2017"),
        "detail": ("llava", coco / "detail_23k.json", coco / "train2017"),
    }
    config = {
        "data": {
            "sources": [
                {"name": name, "format": kind, "annotations": str(annotations), "images": str(images)}
                for name, (kind, annotations, images) in files.items()
            ],
            "image_map": str(tmp_path / "image_map.json"),
            "captions": str(tmp_path / "captions.json"),
            "check_images": "open",
        },
        "visual": {"path": "none"},
        "llm": {"path": "none"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    process_image.main(["--config", str(tmp_path / "config.yaml")])
    rows = {name: len(json.loads(annotations.read_bytes())) for name, (_, annotations, _) in files.items()}
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [(line[0], line[1], line[2]) for line in table[:3]] == [(n, str(rows[n]), str(rows[n])) for n in files]
    photos, entries = read_records(tmp_path / "image_map.json", tmp_path / "captions.json")
    assert table[3][1:5] == [str(len(entries)), str(len(entries)), "68", str(len(entries))]
    assert len(photos) == 68
    assert len(entries) == sum(rows.values())
