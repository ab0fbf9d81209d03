"""Records on the disk (`.sqlite`): what JSON files hold, in the same order, whoever reads them."""

import json
import os
import pickle
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

import process_image
from dataset import formats, raw
from dataset.disk_records import SelectedEntries
from dataset.disk_writer import DiskRecords
from dataset.records import read_records, split_entries
from dataset.register import MemoryRecords
from errors import UserError
from training.data import each_answer

DISK = ("image_map.sqlite", "captions.sqlite")


def prepare(world, names):
    """Prepare the data of `world` into files of these names; their paths."""
    files = [world.output / name for name in names]
    process_image.main(["--config", str(world.config), f"data.image_map={files[0]}", f"data.captions={files[1]}"])
    return files


def rows(names):
    """Rows of jsonl on these photos (None: without), with text before the photo, a dialogue, a region, a bad row."""
    for number, name in enumerate(names):
        photo = {} if name is None else {"image": name}
        yield photo | {"question": f"第{number}个？", "answer": [f"a{number}", f"b{number}"], "type": f"t{number % 2}"}
        if name is not None:
            yield {"images": [name, "0.jpg"], "question": "Same <image>, <image>?", "answer": "No."}
            yield photo | {"box": [0, 0.25, 1, 1.0], "question": "And here?", "answer": "So."}
            later = {"question": "And?", "answer": "Yes.", "image": name}
            yield {"turns": [{"question": "Hello?", "answer": "Hello."}, later]}
        yield {"question": "?"}


@pytest.fixture
def mixed(world):
    """The world with a source of jsonl; photos come again in other sources and out of order."""
    annotations = world.folder / "rows.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows(["2.jpg", None, "1.jpg", "2.jpg", None])))
    world.annotations["mixed"] = annotations
    world.data["sources"].insert(1, world.source("mixed", "jsonl", world.photos[1]))
    world.data["val_fraction"] = 0.3
    world.write_config()
    return world


def test_both_forms_hold_the_same(mixed, monkeypatch):
    photos, entries = read_records(*prepare(mixed, ("image_map.json", "captions.json")))
    beside = [(mixed.output / name).read_bytes() for name in ("rejected.jsonl", "process_report.json")]
    monkeypatch.setattr(raw, "CHUNK", 3)
    monkeypatch.setattr(formats, "WHOLE", 1)
    disk_photos, disk_entries = read_records(*prepare(mixed, DISK))
    assert beside[0].count(b"\n") == 5
    assert beside == [(mixed.output / name).read_bytes() for name in ("rejected.jsonl", "process_report.json")]
    assert dict(disk_photos) == photos
    assert list(disk_entries) == [disk_entries[index] for index in range(len(disk_entries))] == entries
    assert sorted(path.name for path in mixed.output.iterdir()) == [
        "captions.json", "captions.sqlite", "image_map.json", "image_map.sqlite", "process_report.json",
        "rejected.jsonl"
    ]  # fmt: skip


names = st.lists(st.sampled_from(["0.jpg", "1.jpg", "2.jpg", None]), max_size=6)


@given(names, st.floats(0, 0.9))
def test_both_forms_are_split_alike(tmp_path_factory, names, fraction):
    folder = tmp_path_factory.mktemp("split")
    memory, files = MemoryRecords(), [folder / name for name in DISK]
    with DiskRecords(folder) as disk:
        for records in (memory, disk):
            for source in ("a", "b"):
                made = list(rows(names if source == "a" else names[::-1]))
                raw.process_coco(made, folder, records.photos, source=source, into=records)
        disk.write(*files, {})
    json_files = [folder / "m.json", folder / "c.json"]
    process_image.write_records(memory.image_map, memory.captions, *json_files)
    parts = []
    for read in (read_records(*json_files), read_records(*files)):
        try:
            train, val = split_entries(*read, fraction)
        except UserError as error:
            parts.append(str(error))
        else:
            parts.append([list(train), list(val), list(each_answer(train)), list(each_answer(val))])
            assert all(list(part) == [part[index] for index in range(len(part))] for part in (train, val))
    assert parts[0] == parts[1]


def test_the_same_data_make_the_same_bytes(mixed):
    first = [file.read_bytes() for file in prepare(mixed, DISK)]
    assert first == [file.read_bytes() for file in prepare(mixed, DISK)]


def test_check_writes_nothing(mixed, capsys):
    arguments = [f"data.image_map={mixed.output / DISK[0]}", f"data.captions={mixed.output / DISK[1]}"]
    process_image.main(["--config", str(mixed.config), "--check", *arguments])
    assert "nothing was written" in capsys.readouterr().out
    assert not mixed.output.exists()


def test_too_many_rejected_rows_leave_only_the_reports(mixed):
    mixed.data["max_rejected"] = 0.01
    mixed.write_config()
    with pytest.raises(UserError, match="Only .* were written"):
        prepare(mixed, DISK)
    assert sorted(path.name for path in mixed.output.iterdir()) == ["process_report.json", "rejected.jsonl"]
    assert (mixed.output / "rejected.jsonl").read_bytes().count(b"\n") == 5


def first_answer(entries):
    return entries[0].turns[0].answers[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_them(mixed, method):
    _, entries = read_records(*prepare(mixed, DISK))
    selected = SelectedEntries(entries, [2, 3])
    expected = first_answer(selected)
    with ProcessPoolExecutor(1, get_context(method)) as pool:
        assert pool.submit(first_answer, selected).result() == expected
    assert pickle.loads(pickle.dumps(selected))[0] == selected[0]
    with pytest.raises(IndexError):
        entries[len(entries)]


def test_both_files_have_one_form(mixed):
    with pytest.raises(UserError, match=r"let both end in \.sqlite"):
        prepare(mixed, ("image_map.json", "captions.sqlite"))
    with pytest.raises(UserError, match=r"let both end in \.sqlite"):
        read_records(mixed.output / "image_map.sqlite", mixed.output / "captions.json")


def test_what_is_no_record_file_is_one_sentence(mixed, tmp_path):
    image_map, captions = prepare(mixed, DISK)
    with pytest.raises(UserError, match=r"none\.sqlite: No such file or directory; make it again"):
        read_records(tmp_path / "none.sqlite", captions)
    with pytest.raises(UserError, match=r"image_map\.sqlite: no such table: entries; make it again"):
        read_records(image_map, image_map)
    image_map.write_bytes(b"SQLite" * 1000)
    with pytest.raises(UserError, match=r"image_map\.sqlite: file is not a database; make it again"):
        read_records(image_map, captions)


def test_an_entry_that_was_changed_by_hand_is_checked(mixed):
    _, captions = files = prepare(mixed, DISK)
    with sqlite3.connect(captions) as database:
        database.execute('UPDATE entries SET content = \'{"q": "?"}\' WHERE number = 2')
    database.close()
    _, entries = read_records(*files)
    with pytest.raises(UserError, match=r"captions\.sqlite: ID \d+, entry 2 must have a question"):
        list(entries)


def test_a_full_disk_is_one_sentence(mixed, tmp_path):
    with DiskRecords(tmp_path) as disk:
        disk._database.execute("PRAGMA max_page_count = 20")
        many = [{"question": "?" * 3000, "answer": "x"}] * 100
        with pytest.raises(UserError, match="database or disk is full; make room"):
            raw.process_coco(many, tmp_path, 0, into=disk)
    assert not list(tmp_path.glob(".records-*"))


def test_sources_of_a_long_file_are_read_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WHOLE", 40)
    file = tmp_path / "rows.jsonl"
    damaged = "狗".encode("gb18030")
    file.write_bytes(
        b"\xef\xbb\xbf" + "".join(json.dumps({"q": f"{n}?", "a": "x"}) + "\r\n" for n in range(4)).encode()
    )
    with open(file, "ab") as more:
        more.write(b'{"q": "' + damaged + b'"}\n[1]')
    loaded = formats.load_jsonl(file, None, tmp_path, {})
    assert not isinstance(loaded, list)
    for _ in range(2):
        found = list(loaded)
        assert [row.value["q"] for row in found[:4]] == ["0?", "1?", "2?", "3?"]
        assert found[4].problem.reason == "line is not JSON"
        assert found[5].parts[0].place == "line 6"
    file.write_text("[1]\n" * 30)
    with pytest.raises(UserError, match="no line holds a JSON object"):
        list(formats.load_jsonl(file, None, tmp_path, {}))
    file.write_bytes((json.dumps({"q": "这是什么？", "a": "狗"}, ensure_ascii=False) + "\n").encode("gb18030") * 9)
    encodings = {}
    assert len(list(formats.load_jsonl(file, None, tmp_path, encodings))) == 9
    assert list(encodings.values()) == ["GB18030"]


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (1, "DELETE FROM entries WHERE number = 2", "rows of 'entries' are missing"),
        (1, "DELETE FROM entries WHERE number = 1", "rows of 'entries' are missing"),
        (0, "DELETE FROM photos WHERE ID = 1", "rows of 'photos' are missing"),
        (1, "UPDATE entries SET content = '{'", "entry 1: not valid JSON"),
        (0, "UPDATE photos SET box = '[2, 0, 1, 1]'", "has a wrong box"),
    ],
)
def test_a_change_by_hand_is_told(mixed, file, change, sentence):
    files = prepare(mixed, DISK)
    with sqlite3.connect(files[file]) as database:
        database.execute(change)
    database.close()
    with pytest.raises(UserError, match=sentence):
        [list(part) for part in read_records(*files)[::-1]] + [list(read_records(*files)[0].values())]


def test_a_file_that_is_replaced_is_not_mixed_with_the_old_one(mixed):
    files = prepare(mixed, DISK)
    entries = read_records(*files)[1]
    assert entries[0]
    files[1].unlink()
    with sqlite3.connect(files[1]) as other:
        other.executescript("CREATE TABLE entries (number, photo, content); INSERT INTO entries VALUES (1, 0, '{}')")
    other.close()
    assert entries[0]  # this process has the old one open
    with pytest.raises(UserError, match="was replaced while this run reads it"):
        pickle.loads(pickle.dumps(entries))[0]


def test_what_a_killed_run_left_is_deleted(tmp_path):
    for name, age in ((".records-old", 48 * 3600), (".records-running", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "working.sqlite").touch()
        os.utime(tmp_path / name / "working.sqlite", (time.time() - age,) * 2)
    with DiskRecords(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".records-running"]


def test_a_failed_write_changes_nothing(mixed, monkeypatch):
    files = prepare(mixed, DISK)
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr("dataset.disk_writer.CAPTIONS", "CREATE TABLE out.entries (number; ")
    with pytest.raises(UserError, match=r"captions\.sqlite: .*syntax error"):
        prepare(mixed, DISK)
    assert [file.read_bytes() for file in files] == before
    assert not [path for path in mixed.output.iterdir() if "tmp" in path.name or path.name.startswith(".records")]
