"""Two models on the same questions: difference, flips, and what is refused."""

import pytest

from errors import UserError
from evaluation.compare import check_same_questions, compare, find_other
from evaluation.intervals import difference, mcnemar, mean_tally
from evaluation.report import compared_line
from tests.evaluation.colours import ColourModel


class RedModel(ColourModel):
    """Says "red" whatever it is shown, but "yes" to "Sure?"."""

    def answer_many(self, requests):
        for reply in super().answer_many(requests):
            sure = self.calls[-1][0] == "Sure?"
            yield type(reply)("yes" if sure else "red", "stop", 1, 1)


SETTINGS = {"checkpoint": "checkpoint-9", "questions": "q", "split": "val", "limit": None}


def test_the_difference_is_paired_and_flips_are_found_both_ways(run, entries, tmp_path):
    run(entries, RedModel(), folder="checkpoint/eval_val", settings=SETTINGS)
    own = run(entries)
    settings, replies = find_other(tmp_path / "checkpoint", "val")
    assert (settings, replies) == find_other(tmp_path / "checkpoint" / "eval_val", "all")
    assert check_same_questions(SETTINGS | {"checkpoint": "checkpoint-12"}, settings) == ""
    half = {"computed": "float32 on cpu, fp16 weights"}
    assert "fp16 weights here" in check_same_questions(SETTINGS | half, settings)
    found = compare(settings["checkpoint"], own.questions, own.answers["trained"], replies)
    assert [(here.answer, there.answer) for here, there in found.gained] == [
        ("green", "red"), ("blue", "red"), ("黑色", "red"), ("hello", "red")
    ]  # fmt: skip
    assert [(here.question, here.answer, there.answer) for here, there in found.lost] == [("Sure?", "red", "yes")]
    # in the order of asking: red, dialogue on the same photo, three more colours, a text
    here, there = [1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]
    photos = [0, 0, 0, 1, 2, 3, "text"]
    assert found.difference == pytest.approx(difference(mean_tally(here), mean_tally(there), photos))
    assert found.difference.score == pytest.approx(3 / 7)
    assert found.p == mcnemar(list(map(bool, here)), list(map(bool, there))) == pytest.approx(2 * 6 / 32)
    assert found.by_type["colour"].score == 0.75
    assert found.by_type["dialogue"].score == -0.5
    line = compared_line(found)
    assert line.startswith("compared with checkpoint-9: accuracy +0.429 (95 % interval ")
    assert line.endswith("McNemar's p = 0.375; 4 answers are right only here, 1 only there")


def test_a_model_beside_itself_does_not_differ(run, entries, tmp_path):
    own = run(entries)
    _, replies = find_other(tmp_path / "eval", "val")
    found = compare("itself", own.questions, own.answers["trained"], replies)
    assert (found.difference, found.p, found.gained, found.lost) == ((0.0, 0.0, 0.0), 1.0, [], [])


def test_other_questions_are_refused(run, entries, tmp_path):
    mine = SETTINGS | {"questions": "p"}
    with pytest.raises(UserError, match=r"checkpoint-9 was asked other questions \(the data differ\)"):
        check_same_questions(mine, SETTINGS)
    with pytest.raises(UserError, match=r"\(--limit None there and 10 here\)"):
        check_same_questions(mine | {"limit": 10}, SETTINGS)
    with pytest.raises(UserError, match=r"--split val there and all here"):
        check_same_questions(mine | {"split": "all"}, SETTINGS)


def test_an_unfinished_or_missing_evaluation_is_said(run, entries, tmp_path):
    with pytest.raises(UserError, match=r"has neither predictions\.jsonl nor eval_val/predictions\.jsonl"):
        find_other(tmp_path / "checkpoint", "val")
    with pytest.raises(KeyboardInterrupt):
        run(entries, ColourModel(stop_after=3), folder="half")
    own = run(entries)
    _, replies = find_other(tmp_path / "half", "val")
    with pytest.raises(UserError, match="the evaluation of half lacks 4 of 7 answers: run it again"):
        compare("half", own.questions, own.answers["trained"], replies)
