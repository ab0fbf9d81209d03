"""The file of answers: an interrupted evaluation goes on, and answers under other settings are never mixed in."""

import io
import json

import pytest

from errors import UserError
from evaluation.predictions import Predictions, read_predictions
from evaluation.report import metrics_of
from evaluation.runner import list_questions, make_answer
from tests.evaluation.colours import ColourModel

BASELINES = ["blind", "text", "majority"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "eval" / "predictions.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_line_holds_all_of_an_answer(run, entries, file):
    run(entries, baselines=["blind"])
    first, *answers = lines(file)
    assert first == {"settings": {"questions": "q"}}
    assert len(answers) == 14
    assert answers[0] == {
        "pass": "trained",
        "entry": 0,
        "turn": 0,
        "photos": ["red"],
        "type": "colour",
        "source": "demo",
        "question": "Colour?",
        "references": ["red"],
        "answer": "red",
        "accuracy": 1.0,
        "finish_reason": "stop",
    }
    blind = [line for line in answers if line["pass"] == "blind"]
    assert [(line["question"], line["photos"]) for line in blind[:2]] == [("Say hello", []), ("Colour?", ["blue"])]
    assert "黑色" in file.read_text(encoding="utf-8")  # not escaped


@pytest.mark.parametrize("answered", [0, 1, 6, 10, 18])
def test_an_interrupted_evaluation_goes_on_and_finds_the_same(run, entries, file, answered):
    whole = run(entries, ColourModel(), BASELINES, folder="whole", kinds=["blur"])
    model = ColourModel(stop_after=answered)
    with pytest.raises(KeyboardInterrupt):
        run(entries, model, BASELINES, kinds=["blur"])
    with file.open("ab") as stream:
        stream.write(b'{"pass":"trained","entry":3,"turn":0,"answer":"pur')  # the power went in the middle of a line
    rest = ColourModel()
    found = run(entries, rest, BASELINES, kinds=["blur"])
    assert len(model.calls) == answered
    assert len(rest.calls) == 7 + 6 + 6 + 5 * 6 - answered
    assert metrics_of(found, None) == metrics_of(whole, None)
    assert found == whole
    again = lines(file)
    unique = {(line["pass"], line["entry"], line["turn"]) for line in again[1:]}
    assert len(unique) == len(again) - 1 == 7 * 3 + 5 * 6
    assert sorted(again[1:], key=str) == sorted(lines(file.parent.parent / "whole" / file.name)[1:], key=str)


def test_a_finished_evaluation_asks_nothing_again_and_takes_more_passes(run, entries):
    run(entries, ColourModel())
    model = ColourModel()
    run(entries, model)
    assert model.calls == []
    run(entries, model, ["text"])
    assert len(model.calls) == 6


def test_a_broken_line_is_asked_again(run, entries, file):
    run(entries)
    text = file.read_text(encoding="utf-8").splitlines(keepends=True)
    text[2] = "\x00\x00\n"
    text[3] = '{"pass": "trained", "entry": "x"}\n'
    file.write_text("".join(text), encoding="utf-8")
    model = ColourModel()
    run(entries, model)
    assert len(model.calls) == 2


def test_answers_under_other_settings_are_moved_aside(run, entries, file):
    run(entries)
    before = file.read_bytes()
    other = {"questions": "q", "generate": {"temperature": 1.0}}
    with Predictions(file.parent, other) as predictions:
        assert predictions.replies == {}
        assert predictions.note.endswith(
            "predictions.jsonl was made with other settings (generate) and is now predictions.old-1.jsonl"
        )
    assert (file.parent / "predictions.old-1.jsonl").read_bytes() == before
    model = ColourModel()
    run(entries, model, settings=other)
    assert len(model.calls) == 7
    file.write_text('{"pass": "trained"}\n')
    with Predictions(file.parent, other) as predictions:
        assert predictions.note.endswith("has no settings in its first line and is now predictions.old-2.jsonl")


@pytest.mark.parametrize("content", [b"", b'{"settings": {"quest'])
def test_a_file_that_was_hardly_begun_is_begun_again(run, entries, file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    with Predictions(file.parent, {"questions": "q"}) as predictions:
        assert predictions.note == ""
    assert lines(file) == [{"settings": {"questions": "q"}}]


def test_a_full_disk_is_one_sentence(run, entries, tmp_path, monkeypatch):
    def full(self, line):
        raise OSError(28, "No space left on device")

    answer = make_answer(list_questions(entries)[0], (), "red")
    with Predictions(tmp_path, {"questions": "q"}) as predictions:
        monkeypatch.setattr(Predictions, "_append", full)
        with pytest.raises(UserError, match=r"predictions\.jsonl: No space left on device"):
            predictions.add("trained", answer, [])
    with (
        pytest.raises(UserError, match=r"predictions\.jsonl: No space left on device"),
        Predictions(tmp_path / "new", {"questions": "q"}),
    ):
        pass


def test_a_file_without_an_evaluation_is_said(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has no answers of an evaluation"):
        read_predictions(tmp_path / "other.jsonl")


def test_a_disk_that_is_full_at_the_end_is_one_sentence_too(run, entries, tmp_path):
    """`close` writes again what did not fit."""

    class Full(io.BytesIO):
        def flush(self):
            raise OSError(28, "No space left on device")

        def close(self):
            self.flush()

    answer = make_answer(list_questions(entries)[0], (), "red")

    def evaluate(work):
        with Predictions(tmp_path, {"questions": "q"}) as predictions:
            predictions._stream.close()
            predictions._stream = Full()
            work(predictions)

    for work in (lambda _: None, lambda predictions: predictions.add("trained", answer, [])):
        with pytest.raises(UserError, match=r"predictions\.jsonl: No space left on device"):
            evaluate(work)


def test_a_file_without_the_newest_setting_goes_on(tmp_path):
    with Predictions(tmp_path, {"questions": "q"}):
        pass
    with Predictions(tmp_path, {"questions": "q", "photos": "p"}) as predictions:
        assert predictions.note == ""
    with Predictions(tmp_path, {"questions": "q", "photos": "p"}) as predictions:
        assert predictions.note == ""
