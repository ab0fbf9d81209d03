"""Captions are judged by CIDEr-D: no sentence is word for word like a reference, and still the model may look."""

import re

import pytest
from PIL import Image

from dataset.records import Entry, Turn
from evaluation.captions import cider_d
from evaluation.compare import compare, find_other
from evaluation.intervals import difference, interval, mcnemar, mean_tally
from evaluation.report import compared_line, draw_gallery, looks_line, metrics_of, tables
from evaluation.report_html import render_report
from evaluation.scores import all_intervals, are_sentences, judge_values
from evaluation.words import characters, english_words
from tests.evaluation.colours import ColourModel, captions_of

RUN = {"checkpoint": "checkpoint-7"}


class CaptionModel(ColourModel):
    """Says in a sentence which colour it sees."""

    def answer_many(self, requests):
        for reply in super().answer_many(requests):
            yield type(reply)(f"There is a plain {reply.text} wall in this photo.", "stop", 1, 1)


class BlindModel(ColourModel):
    """Says the same of each photo."""

    def answer_many(self, requests):
        for reply in super().answer_many(requests):
            yield type(reply)("There is a plain red wall in this photo.", "stop", 1, 1)


@pytest.fixture
def captions():
    return captions_of("flickr")


def test_what_is_a_sentence():
    assert are_sentences(["A dog runs over the grass with a ball.", "Two men.", "A boy in red jumps into a blue pool."])
    assert not are_sentences(["red", "yes", "A dog runs over the grass with a ball."])
    assert are_sentences(["一个穿红衣服的男孩跳进泳池", "草地上有一只狗在跑"])
    assert not are_sentences(["红色", "两个"])
    assert are_sentences(
        ["两只狗在草地上跑", "一个男孩在玩球", "小孩在雪里"]
    )  # as short as half of Flickr8k's Chinese ones
    assert not are_sentences(["two cups of coffee", "on the left side", "a lamp"])


def test_every_score_has_its_interval_on_the_page_and_in_the_file(run, captions, photos):
    found = run(captions, CaptionModel(), ["blind"])
    intervals = metrics_of(found, None)["intervals"]
    overall = found.results["trained"].overall
    words = overall.captions["words"]
    scores = {"accuracy": overall.accuracy, "F1": overall.token_f1, "ANLS": overall.anls, "ROUGE-L": words["rouge_l"]}
    scores |= {f"BLEU-{order}": words[f"bleu_{order}"] for order in (1, 2, 3, 4)} | {"CIDEr-D": words["cider_d"]}
    assert {name: own["score"] for name, own in intervals.items()} == pytest.approx(scores)
    assert all(own["low"] <= own["score"] <= own["high"] for own in intervals.values())
    assert (intervals["CIDEr-D"]["low"], intervals["CIDEr-D"]["high"]) == overall.measure_interval
    assert (intervals["accuracy"]["low"], intervals["accuracy"]["high"]) == overall.accuracy_interval
    unfolded = render_report(found, None, photos, RUN).partition("Scores of all questions with their 95 % intervals")[2]
    for name, own in intervals.items():
        if name == "BLEU-4" and own["score"] < 1e-4:  # as in the table above it
            assert "<th>BLEU-4</th>" not in unfolded
            continue
        row = f"<tr><th>{name}</th><td>{own['score']:.3f}</td><td>{own['low']:.3f}–{own['high']:.3f}</td></tr>"
        assert row in unfolded


def test_chinese_has_intervals_for_each_way_to_cut_it(run):
    pytest.importorskip("jieba")
    texts = ("一面红色的墙在照片里", "照片里只有一面红色的墙")
    entry = Entry("flickr", "caption", (Turn("<|extra_0|>\n这是什么？", texts, images=(0,)),))
    intervals = all_intervals(run([entry]).answers["trained"])
    ways = ("characters", "jieba")
    assert [name for name in intervals if "CIDEr" in name] == [f"CIDEr-D, {way}" for way in ways]
    assert [name for name in intervals if "BLEU-4" in name] == [f"BLEU-4, {way}" for way in ways]


def test_daquar_has_intervals_of_its_own_scores(run, monkeypatch):
    entries = [
        Entry("daquar", "object", (Turn("<|extra_0|>\nWhat?", (truth,), images=(ID,)),))
        for ID, truth in enumerate(("red, blue", "green", "blue"))
    ]
    monkeypatch.setattr("evaluation.scores.find_nouns", lambda: None)  # WordNet's files are missing
    found = run(entries)
    intervals = all_intervals(found.answers["trained"])
    assert intervals["DAQUAR"].score == found.results["trained"].overall.daquar["accuracy"]
    assert "WUPS" not in intervals
    monkeypatch.setattr("evaluation.scores.find_nouns", lambda: "nouns")
    monkeypatch.setattr("evaluation.scores.wups", lambda answer, references, nouns: 0.5 if answer == "red" else 1.0)
    assert all_intervals(found.answers["trained"])["WUPS"] == pytest.approx((5 / 6, 0.5, 1.0))


def test_cider_d_stands_where_accuracy_does_for_answers(run, captions):
    found = run(captions, CaptionModel(), ["blind", "majority"])
    assert {answer.accuracy for answer in found.answers["trained"]} == {0.0}
    values = {
        name: cider_d([english_words(answer.answer) for answer in answers],
                      [[english_words(text) for text in answer.references] for answer in answers])
        for name, answers in found.answers.items()
    }  # fmt: skip
    assert judge_values(found.answers["trained"], "CIDEr-D") == values["trained"]
    score, photos = found.results["trained"].overall, [0, 1, 2, 3]
    assert score.judged == pytest.approx(interval(mean_tally(values["trained"]), photos))
    assert score.judged.score == score.captions["words"]["cider_d"] > 0.1
    assert found.gain == pytest.approx(difference(*(mean_tally(values[name]) for name in ("trained", "blind")), photos))
    assert found.gain.low > 0
    assert looks_line(found).startswith(f"it looks at the photo: CIDEr-D is higher by {found.gain.score:.3f}")
    first, second = (block.splitlines() for block in tables(found).split("\n\n"))
    assert first[0].split() == ["n", "CIDEr-D", "95", "%", "interval", "blind", "majority"]
    assert first[-1].split()[2] == f"{score.judged.score:.3f}"
    assert "accuracy" in second[0]
    assert "CIDEr-D" not in second[0]
    assert metrics_of(found, None)["measure"] == "CIDEr-D"


def test_a_model_that_says_the_same_of_all_photos_does_not_look(run, captions):
    found = run(captions, BlindModel(), ["blind"])
    assert looks_line(found).startswith("no sign that it looks at the photo: CIDEr-D differs by 0.000")


def test_hard_photos_have_curves_of_cider_d(run, captions, photos):
    found = run(captions, CaptionModel(), ["blind"], kinds=["blur"])
    assert found.hard["blur"][0] == found.results["trained"].overall.judged
    page = render_report(found, None, photos, RUN)
    assert "CIDEr-D of the questions with a photo, by strength" in page
    assert 'aria-label="CIDEr-D by strength"' in page


def test_two_models_are_compared_by_cider_d(run, captions, photos, tmp_path):
    run(captions, BlindModel(), folder="other")
    own = run(captions, CaptionModel())
    _, replies = find_other(tmp_path / "other", "val")
    found = compare("other", own.questions, own.answers["trained"], replies)
    assert found.difference.score > 0
    assert [here.answer.split()[4] for here, _ in found.gained] == ["green", "blue", "黑色"]
    assert found.lost == []
    assert found.p == mcnemar([True, True, True], [False, False, False]) == 0.25
    compared = metrics_of(own, found)["compared"]
    assert (compared["test"], compared["p"], compared["measure"]) == ("sign test", 0.25, "CIDEr-D")
    line = compared_line(found)
    assert line.startswith("compared with other: CIDEr-D +")
    assert line.endswith("the sign test's p = 0.25; 3 answers are better here, 0 there")
    page = render_report(own, found, photos, RUN)
    assert "Better here (3)" in page
    assert "Better in other (0)" in page


def test_sentences_are_not_marked(run, captions, photos, tmp_path):
    found = run(captions, CaptionModel(), ["blind"])
    page = render_report(found, None, photos, RUN)
    assert not set("✓✗") & set(page)
    assert "<h2>CIDEr-D</h2>" in page
    assert "caption (4 answers)" in page
    assert all(float(width) <= 100 for width in re.findall(r"width: ([\d.]+)%\"></div>", page))
    draw_gallery(tmp_path / "gallery.png", found.answers["trained"], photos)
    with Image.open(tmp_path / "gallery.png") as gallery:
        colours = {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}
    assert not {(21, 128, 61), (185, 28, 28)} & colours


def test_chinese_is_judged_by_characters(run):
    texts = ("整张照片里只有一面红色的墙壁。", "照片上是一面很大的红墙。")
    found = run([Entry("zh", "caption", (Turn("<|extra_0|>是什么？", texts, images=(0,)),))], CaptionModel())
    [answer] = found.answers["trained"]
    assert found.sentences == {"zh"}
    assert judge_values([answer], "CIDEr-D") == cider_d([characters(answer.answer)], [[*map(characters, texts)]])
