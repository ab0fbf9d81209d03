"""Tables for a terminal, first line and gallery of an evaluation."""

import pytest
from PIL import Image

from dataset.records import Entry, Turn
from evaluation.report import WIDTH, _display_width, draw_gallery, looks_line, tables
from evaluation.report_html import render_report

ALL_PASSES = ["blind", "text", "majority"]  # the untrained projector needs a model that has one


def chinese():
    return Entry("demo", "颜色", (Turn("<|extra_0|>什么颜色？", ("黑色",), images=(3,)),))


def test_tables_are_aligned(run, entries):
    found = run([*entries, chinese()], baselines=ALL_PASSES)
    accuracy, texts = (block.splitlines() for block in tables(found).split("\n\n"))
    assert accuracy[0].split() == ["n", "accuracy", "95", "%", "interval", "blind", "text", "majority"]
    assert accuracy[-1].split()[:3] == ["all", "8", "0.875"]
    colour = next(line for line in accuracy if line.startswith("colour"))
    row = next(line for line in accuracy if line.startswith("颜色"))
    assert row.split() == ["颜色", "1", "1.000", "1.000–1.000", "0.000", "0.000", "1.000"]
    assert len(row) == len(colour) - 2 == len(accuracy[0]) - 2  # two characters twice as wide
    assert texts[0].split() == ["F1", "ANLS", "BLEU-4", "ROUGE-L", "CIDEr-D", "chrF"]
    assert next(line for line in texts if line.startswith("dialogue")).split()[1:3] == ["0.500", "0.500"]
    assert not any("source" in line for line in accuracy)


def test_sources_have_rows_where_they_cut_the_questions_otherwise(run, entries):
    more = [Entry("other", "colour", (Turn("<|extra_0|>\nColour?", ("red",), images=(0,)),))]
    labels = [line.split("  ")[0].strip() for line in tables(run([*entries, *more])).splitlines()]
    assert [label for label in labels if label.startswith("source")] == ["source demo", "source other"] * 2
    same = [Entry("colour", "colour", entries[0].turns), Entry("text", "text", entries[4].turns)]
    assert "source" not in tables(run(same, folder="same"))


def test_tables_fit_a_terminal(run, entries):
    long = [Entry("demo", name * 30, entries[1].turns) for name in ("very long ", "很长的名字")]
    found = run([*entries, *long], baselines=ALL_PASSES, kinds=["blur", "noise"])
    found.results["untrained"] = found.results["blind"]
    lines = tables(found).splitlines()
    assert max(map(_display_width, lines)) == WIDTH
    assert sum("…" in line for line in lines) == 4
    hard = lines[-4:]
    assert hard[0].split() == ["distorted,", "strength", "0", "1", "2", "3", "4", "5"]
    assert [line.split()[0] for line in hard[2:]] == ["blur", "noise"]
    assert all(len(line.split()) == 7 for line in hard[2:])


def test_first_line_says_whether_it_looks(run, entries):
    found = run(entries, baselines=["blind"])
    assert looks_line(found).startswith("it looks at the photo: accuracy is higher by 0.833 (95 % interval ")
    found.gain = found.gain._replace(score=0.0, low=0.0)
    assert "no sign that it looks at the photo: accuracy differs by 0.000" in looks_line(found)
    found.gain = None
    assert "was not measured" in looks_line(found)


def test_gallery_marks_right_green_and_wrong_red(run, photos, entries, tmp_path):
    wrong = [Entry("demo", "colour", (Turn("<|extra_0|>Colour? " + "long " * 60, ("purple",), images=(1,)),))]
    draw_gallery(tmp_path / "gallery.png", run(entries[:1] + wrong).answers["trained"], photos)
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.size == (4 * 336 + 16, 486 + 16)  # two photos fill one row
        colours = {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}
    assert {(21, 128, 61), (185, 28, 28), (255, 0, 0), (0, 255, 0)} <= colours


def test_gallery_without_a_chinese_font_leaves_chinese_out(run, photos, entries, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.report._CJK_FONTS", {})
    draw_gallery(tmp_path / "gallery.png", run(entries).answers["trained"], photos)
    with Image.open(tmp_path / "gallery.png") as gallery:
        colours = {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}
    assert (0, 0, 255) in colours
    assert (0, 0, 0) not in colours


def test_what_jieba_would_add_is_said(run, entries, photos, monkeypatch):
    hint = "without jieba: pip install jieba"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        found = run([*entries[:3], chinese()])
        assert tables(found).splitlines()[-1].endswith(hint)
        assert hint in render_report(found, None, photos, {"checkpoint": "c"})
        assert hint not in tables(run(entries[:3], folder="english"))
    pytest.importorskip("jieba")
    assert hint not in tables(run([chinese()], folder="jieba"))


@pytest.mark.parametrize("names", [[], ["majority"], ["blind", "text"]])
def test_columns_are_the_baselines_that_ran(run, entries, names):
    head = tables(run(entries, baselines=names)).splitlines()[0]
    assert head.partition("interval")[2].split() == names
