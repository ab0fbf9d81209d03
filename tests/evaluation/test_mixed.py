"""Captions in two languages and short answers in one evaluation: every source has its score; the verdict is right."""

import pytest
from PIL import Image

from answering.request import Reply
from dataset.records import Entry, Turn
from evaluation.captions import caption_scores
from evaluation.compare import compare, find_other
from evaluation.passes import Evaluation
from evaluation.report import compared_line, draw_gallery, looks_line, metrics_of, rows, tables
from evaluation.report_html import render_report
from evaluation.runner import list_questions, make_answer
from evaluation.scores import measure_of, sentence_sources, visual_gain
from evaluation.words import characters, english_words
from tests.evaluation.colours import COLOURS, ColourModel, captions_of

RUN = {"checkpoint": "checkpoint-7"}
CHINESE = dict(zip(COLOURS, ("红", "绿", "蓝", "黑"), strict=True))


def asked(model):
    """The question that was asked last, without the photo's tag."""
    return model.calls[-1][0].removeprefix("<|extra_0|>").strip()


class BilingualModel(ColourModel):
    """Says which colour it sees in a sentence of the question's language, but always "red" to "Colour?"."""

    def answer_many(self, requests):
        for reply in super().answer_many(requests):
            texts = {
                "What is it?": f"There is a plain {reply.text} wall in this photo.",
                "这是什么？": f"照片里有一面{CHINESE.get(reply.text, '白')}色的墙。",
                "Colour?": "red",
            }
            yield Reply(texts[asked(self)], "stop", 1, 1)


class SameModel(ColourModel):
    """Says the same of each photo."""

    def answer_many(self, requests):
        for _ in super().answer_many(requests):
            english = asked(self) != "这是什么？"
            yield Reply(
                "There is a plain red wall in this photo." if english else "照片里有一面红色的墙。", "stop", 1, 1
            )


@pytest.fixture
def english():
    return captions_of("english")


@pytest.fixture
def chinese():
    return [
        Entry("chinese", "caption_zh", (Turn("<|extra_0|>\n这是什么？", texts, images=(ID,)),))
        for ID, name in enumerate(CHINESE.values())
        for texts in [(f"这是一面{name}色的墙壁。", f"照片里只有一面{name}墙。")]
    ]


@pytest.fixture
def short():
    return [
        Entry("daquar", "colour", (Turn("<|extra_0|>\nColour?", (name,), images=(ID,)),))
        for ID, name in enumerate(COLOURS)
        for _ in range(5)  # most questions are short
    ]


def test_captions_in_two_languages_are_judged_by_cider_d(run, english, chinese):
    """A Chinese sentence is not one word, as it is to the cut for English."""
    found = run([*english, *chinese], BilingualModel(), ["blind"])
    assert found.sentences == {"english", "chinese"}
    assert found.gain.low > 0
    assert looks_line(found).startswith("it looks at the photo: CIDEr-D is higher by ")
    same = run([*english, *chinese], SameModel(), ["blind"], folder="same")
    assert looks_line(same).startswith("no sign that it looks at the photo: CIDEr-D differs by 0.000")


def test_each_language_has_the_scores_that_it_has_alone(run, english, chinese, short):
    found = run([*english, *chinese, *short], BilingualModel(), ["blind"]).results["trained"].by_source
    for name, entries in {"english": english, "chinese": chinese, "daquar": short}.items():
        assert run(entries, BilingualModel(), folder=name).results["trained"].overall == found[name]
    assert set(found["english"].captions) == {"words"}
    assert "characters" in found["chinese"].captions


def test_words_of_both_languages_are_counted_together(run, english, chinese):
    found = run([*english, *chinese], BilingualModel())
    cuts = {"english": english_words, "chinese": characters}
    answers = [(cuts[answer.source], answer) for answer in found.answers["trained"]]
    words = [cut(answer.answer) for cut, answer in answers]
    references = [[*map(cut, answer.references)] for cut, answer in answers]
    assert found.results["trained"].overall.captions["characters"] == caption_scores(words, references)


def test_short_answers_and_sentences_are_judged_together_by_f1(run, english, chinese, short):
    found = run([*short, *english, *chinese], BilingualModel(), ["blind", "majority"])
    assert found.sentences == {"english", "chinese"}  # though most true answers are short
    sources = {name: score.measure for name, score in found.results["trained"].by_source.items()}
    assert sources == {"english": "CIDEr-D", "chinese": "CIDEr-D", "daquar": "accuracy"}
    overall = found.results["trained"].overall
    assert (overall.measure, overall.judged.score) == ("F1", overall.token_f1)
    assert found.gain.score == pytest.approx(overall.token_f1 - found.results["blind"].overall.token_f1)
    # it says "red" to the short questions whatever it sees, so only its captions show that it looks
    assert visual_gain(found.answers["trained"], found.answers["blind"], "accuracy").score == 0
    assert looks_line(found).startswith(f"it looks at the photo: F1 is higher by {found.gain.score:.3f}")
    same = run([*short, *english, *chinese], SameModel(), ["blind"], folder="same")
    assert looks_line(same).startswith("no sign that it looks at the photo: F1 differs by 0.000")


def test_tables_name_the_score_of_each_row(run, english, chinese, short, photos):
    found = run([*short, *english, *chinese], BilingualModel(), ["blind"], kinds=["blur"])
    judged, texts, *_ = (block.splitlines() for block in tables(found).split("\n\n"))
    assert judged[0].split() == ["n", "by", "score", "95", "%", "interval", "blind"]
    by = {line.split("  ")[0].strip(): line.split()[-4] for line in judged[2:] if "---" not in line}
    assert by == {"caption": "CIDEr-D", "caption_zh": "CIDEr-D", "colour": "accuracy", "source chinese": "CIDEr-D",
                  "source daquar": "accuracy", "source english": "CIDEr-D", "all": "F1"}  # fmt: skip
    assert {"accuracy", "F1", "CIDEr-D"} <= set(texts[0].split())
    assert found.hard["blur"][0] == found.results["trained"].overall.judged
    assert metrics_of(found, None)["measure"] == "F1"
    page = render_report(found, None, photos, RUN)
    assert "<h2>F1</h2>" in page
    assert "(F1) judges all together" in page
    assert "<th>all</th><td>28</td><td>F1</td>" in page
    assert "caption (4 answers)" in page
    assert "colour (5 right, 15 wrong)" in page


def test_two_models_are_compared_by_f1(run, english, short, photos, tmp_path):
    run([*short, *english], SameModel(), folder="other")
    own = run([*short, *english], BilingualModel())
    found = compare("other", own.questions, own.answers["trained"], find_other(tmp_path / "other", "val")[1])
    assert found.measure == "F1"
    assert {here.question for here, _ in found.gained} == {"Colour?", "What is it?"}
    assert compared_line(found).startswith("compared with other: F1 +")
    assert "the sign test's p" in compared_line(found)
    cards = render_report(own, found, photos, RUN).partition("<h2>Beside other</h2>")[2].partition("<h2>Examples")[0]
    assert '<span class="right">✓ red</span>' in cards
    assert '<span class="said">There is a plain' in cards


def test_only_short_answers_are_marked_in_the_gallery(run, english, short, photos, tmp_path):
    def colours(entries, name):
        draw_gallery(
            tmp_path / name, run(entries, BilingualModel(), folder=f"{name} answers").answers["trained"], photos
        )
        with Image.open(tmp_path / name) as gallery:
            return {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}

    assert (185, 28, 28) in colours([*short[5:10], *english[:1]], "mixed.png")
    assert (185, 28, 28) not in colours([*short[:5], *english[1:]], "right.png")


def test_a_type_of_both_kinds_is_judged_by_f1(run, english, short):
    same_type = [Entry(entry.source, "any", entry.turns) for entry in (*short, *english)]
    found = run(same_type, BilingualModel())
    measures = {row.label: row.scores["trained"].measure for row in rows(found.results)}
    assert measures == {"any": "F1", "source daquar": "accuracy", "source english": "CIDEr-D", "all": "F1"}


def test_a_source_with_both_is_judged_by_what_most_of_its_answers_are(photos):
    entries = [
        Entry("one", "x", (Turn("<|extra_0|>?", (text,), images=(0,)),))
        for text in ("red", "blue", "A dog runs over the grass with a ball.")
    ]
    answers = [make_answer(question, (0,), "red") for question in list_questions(entries)]
    assert measure_of(answers, sentence_sources(answers)) == "accuracy"
    assert Evaluation([], {"trained": answers}).measure == "accuracy"


def test_a_few_sentences_among_short_answers_change_nothing():
    """As in the demo, where 26 of 1,110 questions ask for captions."""
    short = Entry("s", "s", (Turn("Colour?", ("red",)),))
    long = Entry("l", "l", (Turn("Describe it.", ("A wall that is plain red from left to right.",)),))
    for sentences, measure in ((1, "accuracy"), (2, "F1")):
        entries = [short] * 9 + [long] * sentences
        answers = [make_answer(question, (), "red") for question in list_questions(entries)]
        assert measure_of(answers, sentence_sources(answers)) == measure
