"""The command line: one question, a file of questions, and what it says about bad input."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import predict
from answering.question_file import answer_file
from answering.request import Reply, ReplyStream
from errors import UserError
from visual.transform import load_image


class FakeChat:
    """Messages are texts; photos stand at their tags."""

    @staticmethod
    def question(text, photos):
        assert text.count("<|extra_0|>") >= photos
        return text.replace("<|extra_0|>", "[photo]", photos).removeprefix("[photo]\n")

    @staticmethod
    def answer(text):
        return f"({text})"


class FakeAnswerer:
    """Answers with the whole dialogue and the sizes of its photos."""

    def __init__(self, model):
        self.chat = FakeChat

    def stream(self, image, messages):
        assert image is None
        return self.stream_messages(messages[-1]["images"], [message["content"] for message in messages])

    def stream_messages(self, photos, messages):
        return ReplyStream(self.pieces(photos, messages))

    def answer_many(self, requests):
        for request in requests:
            try:
                yield self.stream_messages(*request).rest()
            except UserError as error:
                yield error

    def pieces(self, photos, messages):
        sizes = [str(load_image(photo).size) for photo in photos]
        pieces = [" ".join(messages), " ", " ".join(sizes or ["no photo"])]
        yield from pieces
        return Reply("".join(pieces), "stop", 1, len(pieces))


@pytest.fixture
def loaded(monkeypatch):
    """What `load_checkpoint` was called with."""
    calls = []

    def load(folder, overrides):
        calls.append((folder, overrides))
        return SimpleNamespace()

    monkeypatch.setattr("model.checkpoint.load_checkpoint", load)
    monkeypatch.setattr("answering.answer.Answerer", FakeAnswerer)
    return calls


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "红 photo.png")
    (tmp_path / "empty.jpg").touch()
    return tmp_path


def test_one_question_is_streamed(loaded, folder, capsys):
    photo = str(folder / "红 photo.png")
    predict.main(
        ["--checkpoint", "here", "--image", photo, "--question", "什么？", "generate.max_new_tokens=5", "llm.path=a=b"]
    )
    assert capsys.readouterr().out == "什么？ (30, 20)\n"
    assert loaded == [(Path("here").absolute(), {"generate.max_new_tokens": 5, "llm.path": "a=b"})]


def test_several_photos_of_one_question(loaded, folder, capsys):
    Image.new("RGB", (5, 6)).save(folder / "b.png")
    photos = ["--image", str(folder / "b.png"), "--image", str(folder / "红 photo.png")]
    predict.main(["--checkpoint", "here", *photos, "--question", "Same?"])
    assert capsys.readouterr().out == "Same? (5, 6) (30, 20)\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": ["a.png", "b.png"], "question": "?"}, "[photo][photo]? (1, 2) (3, 4)"),
        ({"images": ["b.png"], "question": "?"}, "? (3, 4)"),
        ({"images": "b.png", "image": "b.png", "q": "?", "a": "old"}, "? (3, 4)"),
        ({"image_id": "a.png", "question": "?"}, "? (1, 2)"),
        ({"image": ["a.png", "b.png"], "question": "Is <image> in <image>?"}, "Is [photo] in [photo]? (1, 2) (3, 4)"),
        ({"question": "<|extra_0|>", "image": "a.png"}, "<|extra_0|> (1, 2)"),
        (
            {"image": "a.png", "turns": [{"question": "1", "answer": "x"}, {"question": "2", "image": "b.png"}]},
            "1 (x) 2 (1, 2) (3, 4)",
        ),
        (
            {"turns": [{"q": "1", "a": ["x", "y"]}, {"q": "2", "a": "z", "images": ["b.png", "a.png"]}]},
            "1 (x) [photo][photo]2 (3, 4) (1, 2)",
        ),
        (
            {"image": ["b.png"], "turns": [{"question": "1", "answer": "<image>"}, {"question": "2 <image>"}]},
            "1 (<image>) 2 [photo] (3, 4)",
        ),
        ({"conversations": [{"from": "human", "value": "<image>\n1"}], "image": "a.png"}, "1 (1, 2)"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1"},
                    {"from": "gpt", "value": "x"},
                    {"from": "human", "value": "2 <image>"},
                    {"from": "gpt", "value": "y"},
                ],
                "image": "a.png",
            },
            "1 (x) 2 [photo] (1, 2)",
        ),
    ],
)
def test_rows_with_photos_of_several_turns(folder, row, expected):
    Image.new("RGB", (1, 2)).save(folder / "a.png")
    Image.new("RGB", (3, 4)).save(folder / "b.png")
    (folder / "in.jsonl").write_text(json.dumps(row))
    assert answer_file(FakeAnswerer(None), folder / "in.jsonl", folder / "out.jsonl") == (1, 0)
    answer = json.loads((folder / "out.jsonl").read_text())["answer"]
    assert answer.replace("[photo]\n", "[photo]") == expected


def test_a_question_without_photo(loaded, capsys):
    predict.main(["--checkpoint", "here", "--question", "hello"])
    assert capsys.readouterr().out == "hello no photo\n"


def test_file_keeps_order_and_keys_and_goes_on_after_bad_rows(loaded, folder, capsys):
    rows = [
        '{"image": "红 photo.png", "question": "one", "id": 7, "answer": "old", "error": "old"}',
        "",
        '{"question": "two", "image": null}',
        '{"image": "missing.png", "question": "three"}',
        '{"image": "empty.jpg", "question": "four"}',
        "{not json",
        "[1]",
        '{"question": "  "}',
        '{"question": "six", "image": 5}',
        '{"question": "seven \\ud83d"}',
    ]
    (folder / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="8 of 10 rows"):
        predict.main(["--checkpoint", "c", "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")])
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert answers[0] == {"image": "红 photo.png", "question": "one", "id": 7, "answer": "one (30, 20)"}
    assert answers[1] == {"image": None, "question": "two", "answer": "two no photo"}
    for number, part in {
        2: "missing.png",
        3: "empty",
        4: "JSON",
        5: "list",
        6: "question",
        7: "image",
        8: r"(\ud83d at character 7)",
        9: "UTF-8",
    }.items():
        assert part in answers[number]["error"], answers[number]
        assert "answer" not in answers[number]
    assert answers[4]["line"] == 6
    assert answers[8]["question"] == "seven ?"
    assert "2 rows answered, 8 with an error" in capsys.readouterr().out


def test_answers_are_on_disk_before_the_next_is_asked_for(folder):
    (folder / "in.jsonl").write_text('{"question": "one"}\n{"question": "two"}\n')
    lines_before = []

    class Watching(FakeAnswerer):
        def pieces(self, photos, messages):
            lines_before.append(len((folder / "out.jsonl").read_text().splitlines()))
            return super().pieces(photos, messages)

    assert answer_file(Watching(None), folder / "in.jsonl", folder / "out.jsonl") == (2, 0)
    assert lines_before == [0, 1]


class ChoosyAnswerer(FakeAnswerer):
    def pieces(self, photos, messages):
        question = messages[-1]
        if question == "defect":
            raise IndexError("of ours " + "x" * 1000)
        if question == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if question == "stop":
            raise KeyboardInterrupt
        return super().pieces(photos, messages)


ODD_ROWS = [
    "[" * 100_000,
    '{"question": "?", "extra": ' + "[" * 900 + "]" * 900 + "}",
    '{"question": "?", "extra": ' + "1" * 5000 + "}",
    '{"question": "?", "extra": NaN}',
    '{"question": "?", "extra": -Infinity}',
    '{"question": "?", "extra": 1e999}',
    '{"question": {"a": 1}}',
    '{"question": ["?"]}',
    '{"question": 5}',
    '{"question": true}',
    '{"question": "?", "image": ""}',
    '{"question": "?", "image": ["in.jsonl", ""]}',
    '{"question": "?", "image": [["a"]]}',
    '{"question": "?", "images": {"a": "b"}}',
    '{"question": "?", "image": "a", "images": ["b"]}',
    '{"question": "?", "image_id": 5}',
    '{"question": "<image> ?"}',
    '{"question": "<image> <|extra_0|>", "image": "in.jsonl"}',
    '{"turns": []}',
    '{"turns": "?"}',
    '{"turns": ["?"]}',
    '{"turns": [{"question": "?"}, {"question": "?"}]}',
    '{"turns": [{"question": "?", "answer": []}, {"question": "?"}]}',
    '{"turns": [{"question": "?", "answer": "\\ud800"}, {"question": "?"}]}',
    '{"turns": [{"question": "?", "image": "a"}], "image": "b"}',
    '{"turns": [{"question": "?", "answer": "a"}, {"question": "<image> <image>", "image": "b"}]}',
    '{"conversations": []}',
    '{"conversations": {"from": "human"}}',
    '{"conversations": [{"from": "gpt", "value": "?"}]}',
    '{"conversations": [{"from": "human", "value": "?"}, {"from": "human", "value": "?"}]}',
    '{"conversations": [{"from": "human"}]}',
    '{"question": "?", "image": {}}',
    '{"question": "?", "image": "."}',
    '{"question": "?", "image": "/"}',
    '{"question": "?", "image": "\\u0000"}',
    '{"question": "?", "image": "\\ud800"}',
    '{"question": "?", "image": "' + "x" * 300 + '"}',
    '{"question": "?", "image": "' + "x/" * 3000 + '"}',
    '{"question": "?", "image": "/dev/null"}',
    '{"question": "?", "image": "in.jsonl"}',
    '{"question": "\\ud800"}',
    '{"question": "defect"}',
    "null",
    '"text"',
    "1",
    "{}",
    "\x00",
]


def test_every_row_is_answered_or_says_why_not(folder):
    (folder / "in.jsonl").write_text("\n".join([*ODD_ROWS, '{"question": "last"}']), encoding="utf-8")
    answered, failed = answer_file(ChoosyAnswerer(None), folder / "in.jsonl", folder / "out.jsonl")
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == len(ODD_ROWS) + 1 == answered + failed
    assert rows[-1]["answer"] == "last no photo"
    for text, row in zip(ODD_ROWS, rows, strict=False):
        if "[" * 900 in text and len(text) < 10_000 and "answer" in row:
            continue  # how deep is too deep depends on the Python
        assert "answer" not in row, text[:60]
        assert 0 < len(row["error"]) < 1000, text[:60]
    assert rows[ODD_ROWS.index('{"question": "defect"}')]["error"].startswith("IndexError: of ours")


@pytest.mark.parametrize(("question", "error"), [("memory", RuntimeError), ("stop", KeyboardInterrupt)])
def test_out_of_memory_and_ctrl_c_end_at_once_and_keep_what_was_answered(folder, question, error):
    questions = ["one", question, "three"]
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in questions))
    with pytest.raises(error):
        answer_file(ChoosyAnswerer(None), folder / "in.jsonl", folder / "out.jsonl")
    assert [json.loads(line)["answer"] for line in (folder / "out.jsonl").read_text().splitlines()] == ["one no photo"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_is_said(folder):
    (folder / "in.jsonl").write_text('{"question": "one"}\n{"question": "two"}\n')
    with pytest.raises(UserError, match="/dev/full: No space left on device"):
        answer_file(FakeAnswerer(None), folder / "in.jsonl", Path("/dev/full"))


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_the_input_is_not_overwritten_through_a_link(loaded, folder, link):
    (folder / "in.jsonl").write_text('{"question": "one"}\n')
    try:
        getattr(folder / "out.jsonl", link)(folder / "in.jsonl")
    except OSError:
        pytest.skip("links are not allowed here")
    with pytest.raises(UserError, match="overwrite the input"):
        predict.main(["--checkpoint", "c", "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")])
    assert (folder / "in.jsonl").read_text() == '{"question": "one"}\n'
    assert loaded == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --question"),
        (["--question", "a", "--input", "b"], "either --question"),
        (["--question", "a", "--output", "b"], "--output belongs"),
        (["--input", "in.jsonl"], "needs --output"),
        (["--input", "missing.jsonl", "--output", "b"], "input file not found"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "overwrite"),
        (["--input", "in.jsonl", "--output", "no/where.jsonl"], "folder of --output"),
        (["--input", "in.jsonl", "--output", "."], "is a folder"),
        (["--input", "in.jsonl", "--output", "x" * 300], "name too long"),
        (["--input", "x" * 300, "--output", "b"], "input file not found"),
        (["--question", "a\udcff"], r"--question is not valid Unicode text \(\\udcff at character 2\)"),
        (["--question", "a", "--image", "x" * 300], "photo not found"),
        (["--question", "a", "--image", "."], "photo not found"),
    ],
)
def test_bad_arguments_are_said_before_the_model_is_loaded(loaded, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "in.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=message):
        predict.main(["--checkpoint", "c", *arguments])
    assert loaded == []


def test_script_ends_with_one_line_and_status_1(tmp_path):
    script = [sys.executable, str(Path(predict.__file__)), "--checkpoint", str(tmp_path / "none"), "--question", "a"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "none" in done.stderr
