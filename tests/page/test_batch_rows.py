"""The rows of the batch tab: read from files, answered, and written as files."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from answering.request import Reply
from config import Generate
from errors import UserError
from page.batch import answer_rows, as_csv, as_jsonl, as_table, read_rows
from page.chat import UploadedPhoto
from tests.page.driver import SpokenEngine
from visual.transform import load_image


@pytest.fixture
def uploaded(tmp_path):
    photos = []
    for number in (1, 2):
        Image.new("RGB", (number, 1)).save(tmp_path / f"{number}.png")
        photos.append(UploadedPhoto(str(tmp_path / f"{number}.png"), f"{number}.png"))
    return photos


def rows_of(tmp_path, *lines):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return read_rows([], [UploadedPhoto(str(tmp_path / "rows.jsonl"), "rows.jsonl")], "")


def test_rows_of_photos_and_one_question(uploaded):
    rows = read_rows(uploaded, [], "What?")
    (batch,) = answer_rows(SpokenEngine(), rows, uploaded, Generate(), "")
    assert batch == [
        {"image": "1.png", "question": "What?", "answer": "1 What?"},
        {"image": "2.png", "question": "What?", "answer": "1 What?"},
    ]
    assert read_rows(uploaded, [], "") == []


def test_rows_of_a_file_keep_their_fields_and_a_bad_row_fails_alone(tmp_path, uploaded):
    rows = rows_of(
        tmp_path,
        '{"image": "photos/1.png", "question": "One?", "id": 5, "answer": "old"}',
        "",
        '{"image": ["1.png", "2.png"], "question": "二？"}',
        "{",
        "[1]",
        '{"image": "3.png", "question": "?"}',
        '{"image": "../../etc/passwd", "question": "?"}',
        '{"image": "1.png"}',
        '{"image": "1.png", "question": "Part?", "box": [0.0, 0.0, 0.5, 1.0]}',
        '{"image": "1.png", "question": "Part?", "box": [0.5, 0.0, 0.1, 1.0]}',
        '{"image": "1.png", "question": "One\u2028line?"}',
        '{"image": "1.png", "question": "?", "id": NaN}',
        '{"image": 5, "question": "?"}',
    )
    (batch,) = answer_rows(SpokenEngine(), rows, uploaded, Generate(), "")
    assert batch[0] == {"image": "photos/1.png", "question": "One?", "id": 5, "answer": "1 One?"}
    assert batch[1]["answer"] == "2 二？"
    assert [row.get("error", "")[:14] for row in batch[2:]] == [
        "not valid JSON", "expected {\"ima", "the photo '3.p", "the photo '../", '"question" mus', "", "the box 0.5,0.",
        "", "not valid JSON", '"image" must b'
    ]  # fmt: skip
    assert batch[9]["answer"] == "1 One\u2028line?"
    assert batch[7]["answer"] == "2 Part?"  # the photo and its part
    lines = [json.loads(line) for line in as_jsonl(batch).splitlines()]  # of bytes: only at line feeds
    assert lines == batch
    table = list(csv.reader(io.StringIO(as_csv(batch).decode("utf-8-sig"))))
    assert table[0] == ["image", "question", "answer", "error"]
    assert table[2][:3] == ["1.png, 2.png", "二？", "2 二？"]
    assert as_table(batch)[2][2].startswith("⚠ not valid JSON")


def test_no_text_is_a_formula_in_a_spreadsheet():
    rows = [{"image": "=1.png", "question": "+?", "answer": "-5"}, {"image": "1.png", "question": -5, "error": "@x"}]
    table = list(csv.reader(io.StringIO(as_csv(rows).decode("utf-8-sig"))))
    assert table[1:] == [["'=1.png", "'+?", "'-5", ""], ["1.png", "-5", "", "'@x"]]
    assert [json.loads(line) for line in as_jsonl(rows).splitlines()] == rows


class ReadingEngine(SpokenEngine):
    """Reads the photos, as a model does."""

    def answer_many(self, requests, settings=None):
        for request in requests:
            try:
                yield Reply(str([load_image(photo).size for photo in request.photos]), "stop", 1, 1)
            except UserError as error:
                yield error


def test_an_error_of_a_row_names_the_users_file(uploaded):
    (first, second) = (Path(photo.path) for photo in uploaded)
    first.write_bytes(second.read_bytes()[:40])
    (batch,) = answer_rows(ReadingEngine(), read_rows(uploaded, [], "What?"), uploaded, Generate(), "")
    assert batch[0]["error"].startswith("1.png")
    assert "/" not in batch[0]["error"]
    assert batch[1]["answer"] == "[(2, 1)]"


def test_a_name_that_two_different_uploads_have_is_refused(tmp_path, uploaded):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (3, 1)).save(tmp_path / "other" / "1.png")
    photos = [*uploaded, UploadedPhoto(str(tmp_path / "other" / "1.png"), "1.png"), uploaded[1]]
    (batch,) = answer_rows(SpokenEngine(), read_rows(photos, [], "What?"), photos, Generate(), "")
    assert ["several uploads" in row.get("error", "") for row in batch] == [True, False, True, False]


def test_many_rows_come_in_batches(uploaded):
    rows = [{"image": "1.png", "question": str(number)} for number in range(40)]
    batches = list(answer_rows(SpokenEngine(), rows, uploaded, Generate(), ""))
    assert [len(batch) for batch in batches] == [16, 16, 8]
    assert [row["answer"] for batch in batches for row in batch] == [f"1 {number}" for number in range(40)]
