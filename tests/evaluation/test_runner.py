"""Grouping, blind pass, scores by type, reports and script, with an answerer that reads colours off the photo."""

import itertools
import json
from types import SimpleNamespace

import pytest
from PIL import Image

import eval_vqa
from answering.request import Reply
from config import parse_config
from dataset.records import Entry, Photo, Turn
from errors import UserError
from evaluation.report import draw_gallery, looks_line, table, write_json
from evaluation.runner import _other_photos, evaluate, sample_photos, visual_gain
from visual.transform import load_image
from visual_plan import VisualPlan

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "黑色": (0, 0, 0)}


class ColourAnswerer:
    """Names the colour of the photo it is shown and remembers (question, colours, number of earlier messages).

    `places` has the number of photos in each question of a dialogue, for every call.
    """

    def __init__(self):
        self.calls = []
        self.places = []
        chat = SimpleNamespace(
            question=lambda text, plans: (text, len(plans)), answer=lambda text: text, plan=VisualPlan(1)
        )
        self.model = SimpleNamespace(processor=SimpleNamespace(chat=chat))

    def answer_many(self, requests):
        for photos, messages in requests:
            try:
                colours = [load_image(photo).getpixel((0, 0)) for photo in photos]
            except UserError as error:
                yield error
                continue
            self.calls.append((messages[-1][0], colours, len(messages) - 1))
            self.places.append([count for _, count in messages[::2]])
            names = [name for name, colour in COLOURS.items() if colour in colours[:1]]
            yield Reply(names[0] if names else "hello", "stop", 1, 1)


@pytest.fixture
def photos(tmp_path):
    for ID, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 30 + ID), colour).save(tmp_path / f"{name}.png")
    return {ID: Photo(ID, name, f"{name}.png", tmp_path / f"{name}.png") for ID, name in enumerate(COLOURS)}


@pytest.fixture
def entries():
    colours = [
        Entry("demo", "colour", (Turn("<|extra_0|>\nColour?", (name,), images=(ID,)),))
        for ID, name in enumerate(COLOURS)
    ]
    dialogue = (Turn("<|extra_0|>Red?", ("red",), images=(0,)), Turn("Sure?", ("yes",)))
    text = Entry("demo", "text", (Turn("Say hello", ("hello",)),))
    return [*colours, text, Entry("demo", "dialogue", dialogue)]


def test_scores_by_type_and_in_all(photos, entries):
    result = evaluate(ColourAnswerer(), entries, photos)
    assert {name: score.accuracy for name, score in result.by_type.items()} == {"colour": 1, "text": 1, "dialogue": 0.5}
    assert result.overall.questions == 7
    assert result.overall.accuracy == pytest.approx(6 / 7)
    assert result.photos == 4
    assert [answer.question for answer in result.answers if answer.type == "dialogue"] == ["Red?", "Sure?"]


def test_questions_of_one_photo_come_in_a_row(photos, entries):
    answerer = ColourAnswerer()
    evaluate(answerer, entries, photos)
    shown = [colours for _, colours, _ in answerer.calls]
    changes = sum(before != after for before, after in itertools.pairwise(shown))
    assert changes == 4  # four photos and one text
    assert [(question, earlier) for question, _, earlier in answerer.calls][:3] == [
        ("<|extra_0|>\nColour?", 0),
        ("<|extra_0|>Red?", 0),
        ("Sure?", 2),  # after the first question and its true answer
    ]


def test_blind_shows_another_photo_every_time_and_the_same_in_every_run(photos, entries):
    first, second = ColourAnswerer(), ColourAnswerer()
    result = evaluate(first, entries, photos, blind=True)
    evaluate(second, entries, photos, blind=True)
    assert first.calls == second.calls
    own = ColourAnswerer()
    evaluate(own, entries, photos)
    for (question, colours, _), (own_question, own_colours, _) in zip(first.calls, own.calls, strict=True):
        assert question == own_question
        assert len(colours) == len(own_colours)
        assert not set(colours) & set(own_colours)
    assert result.by_type["colour"].accuracy == 0
    assert result.by_type["colour"].questions == 4
    assert all(0 not in answer.images for answer in result.answers if answer.type == "dialogue")


def test_blind_keeps_several_photos_apart_from_their_own(photos):
    entry = Entry("demo", "pair", (Turn("<|extra_0|><|extra_0|>Same?", ("no",), images=(0, 2)),))
    others = [Entry("demo", "one", (Turn("<|extra_0|>?", ("x",), images=(ID,)),)) for ID in (1, 3)]
    result = evaluate(ColourAnswerer(), [entry, *others], photos, blind=True)
    assert set(result.answers[0].images) <= {1, 3}


@pytest.mark.parametrize("blind", [False, True])
def test_photos_of_later_turns_are_shown_from_their_turn_on(photos, blind):
    turns = [
        Turn("Hello <|extra_0|>", ("Hi",)),
        Turn("<|extra_0|>Colour? <|extra_0|>", ("green",), images=(1,)),
        Turn("Sure?", ("yes",)),
        Turn("<|extra_0|><|extra_0|>Same?", ("no",), images=(0, 1)),
    ]
    answerer = ColourAnswerer()
    result = evaluate(answerer, [Entry("demo", "d", tuple(turns)), *many(4)], photos, blind=blind)
    one, two = (3, 2) if blind else (1, 0)  # blind: half the list of four further on, and none of the entry's own
    shown = [(), (one,), (one,), (one, two, one)]
    assert [answer.images for answer in result.answers[:4]] == shown
    assert [answer.question for answer in result.answers[:4]] == [
        "Hello <|extra_0|>",
        "Colour? <|extra_0|>",
        "Sure?",
        "Same?",
    ]
    colours = list(COLOURS.values())
    calls = zip(answerer.calls, turns, shown, strict=False)
    assert all(call == (turn.question, [colours[ID] for ID in IDs], 2 * n) for n, (call, turn, IDs) in enumerate(calls))
    assert answerer.places[:4] == [[0], [0, 1], [0, 1, 0], [0, 1, 0, 2]]


def test_what_cannot_be_evaluated_is_said(photos, entries):
    with pytest.raises(ValueError, match="no questions"):
        evaluate(ColourAnswerer(), [], photos)
    with pytest.raises(ValueError, match="--no-blind"):
        evaluate(ColourAnswerer(), entries[:1], photos, blind=True)
    photos[0].path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"red\.png"):
        evaluate(ColourAnswerer(), entries, photos)


def test_table_is_aligned_and_json_holds_all(photos, entries, tmp_path):
    chinese = Entry("demo", "颜色", (Turn("<|extra_0|>什么颜色？", ("黑色",), images=(3,)),))
    trained = evaluate(ColourAnswerer(), [*entries, chinese], photos)
    blind = evaluate(ColourAnswerer(), [*entries, chinese], photos, blind=True)
    lines = table(trained, blind).splitlines()
    assert lines[0].split() == ["type", "questions", "accuracy", "blind", "token", "F1", "BLEU-4", "chrF"]
    assert lines[-1].split()[:4] == ["all", "8", "0.875", "0.125"]
    colour = next(line for line in lines if line.startswith("colour"))
    row = next(line for line in lines if line.startswith("颜色"))
    assert len(row) == len(colour) - 2 == len(lines[0]) - 2  # two characters twice as wide

    write_json(tmp_path / "new" / "eval.json", trained, blind, split="val")
    report = json.loads((tmp_path / "new" / "eval.json").read_text(encoding="utf-8"))
    assert report["split"] == "val"
    assert report["trained"]["by_type"]["颜色"]["accuracy"] == 1
    assert ["黑色"] in [answer["references"] for answer in report["blind"]["answers"]]
    assert "blind" not in table(trained, None)


def test_first_line_says_whether_it_looks(photos, entries):
    passes = [evaluate(ColourAnswerer(), entries, photos, blind=blind) for blind in (False, True)]
    gain = visual_gain(*passes)
    assert gain.score == pytest.approx(5 / 6)  # six questions with a photo; "Sure?" is wrong both times
    assert 2 / 3 - 1e-9 <= gain.low < gain.score <= gain.high <= 1  # 2 / 3: only the photo of "Sure?" is drawn
    assert looks_line(gain).startswith("it looks at the photo: accuracy is higher by 0.833 (95 % interval ")
    assert "no sign that it looks at the photo: accuracy differs by 0.000" in looks_line(
        visual_gain(passes[1], passes[1])
    )
    assert visual_gain(*[evaluate(ColourAnswerer(), entries[4:5], photos)] * 2) is None


def test_scores_hold_interval_and_caption_scores(photos, entries):
    score = evaluate(ColourAnswerer(), entries, photos).by_type["dialogue"]
    assert score.accuracy_interval == (0.5, 0.5)  # both questions are on one photo
    assert score.anls == 0.5
    assert score.captions["words"]["bleu_1"] == pytest.approx(0.5)
    chinese = Entry("demo", "颜色", (Turn("<|extra_0|>什么颜色？", ("黑色",), images=(3,)),))
    scores = evaluate(ColourAnswerer(), [chinese], photos).overall.captions
    assert scores["characters"]["rouge_l"] == 1
    assert scores["characters"]["bleu_2"] == pytest.approx(1)


def test_gallery_marks_right_green_and_wrong_red(photos, entries, tmp_path):
    wrong = [Entry("demo", "colour", (Turn("<|extra_0|>Colour? " + "long " * 60, ("purple",), images=(1,)),))]
    result = evaluate(ColourAnswerer(), entries[:1] + wrong, photos)
    draw_gallery(tmp_path / "gallery.png", result, photos)
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.size == (4 * 336 + 16, 2 * 486 + 16)
        colours = {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}
    assert {(21, 128, 61), (185, 28, 28), (255, 0, 0), (0, 255, 0)} <= colours


def test_gallery_without_a_chinese_font_leaves_chinese_out(photos, entries, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.report._CJK_FONTS", {})
    result = evaluate(ColourAnswerer(), entries, photos)
    draw_gallery(tmp_path / "gallery.png", result, photos)
    with Image.open(tmp_path / "gallery.png") as gallery:
        colours = {colour for _, colour in gallery.convert("RGB").getcolors(1 << 20)}
    assert (0, 0, 255) in colours
    assert (0, 0, 0) not in colours


def test_script_scores_a_split_and_writes_the_files(photos, entries, tmp_path, monkeypatch, capsys):
    image_map = {
        photo.key: {"ID": ID, "image_file": photo.image_file, "path": str(photo.path)} for ID, photo in photos.items()
    }
    captions = {str(ID): [{"source": "demo", "q": "<|extra_0|>?", "a": [name]}] for ID, name in enumerate(COLOURS)}
    for name, content in {"image_map": image_map, "captions": captions}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    loaded = []

    def read_config(folder, overrides):
        data = {key.removeprefix("data."): value for key, value in overrides.items()}
        return parse_config({"data": data, "visual": {"path": "v"}, "llm": {"path": "l"}}, "test")

    def load(folder, overrides):
        loaded.append(folder)

    monkeypatch.setattr(eval_vqa, "read_config", read_config)
    monkeypatch.setattr(eval_vqa, "load_checkpoint", load)
    monkeypatch.setattr(eval_vqa, "Answerer", lambda model: ColourAnswerer())
    (tmp_path / "checkpoint-1").mkdir()
    files = [f"data.image_map={tmp_path / 'image_map.json'}", f"data.captions={tmp_path / 'captions.json'}"]
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint-1")]
    eval_vqa.main([*checkpoint, "--split", "all", "--limit", "3", "--gallery", str(tmp_path / "g.png"), *files])
    assert json.loads((tmp_path / "checkpoint-1" / "eval_all.json").read_text())["trained"]["overall"]["questions"] == 3
    assert (tmp_path / "g.png").is_file()
    assert "accuracy" in capsys.readouterr().out
    loaded.clear()
    wrong = {
        "val_fraction": [*files, "data.val_fraction=0"],
        "--limit must be at least 1 photo, found -3": [*files, "--limit", "-3"],
        "--output: .* is a folder": [*files, "--split", "all", "--output", str(tmp_path)],
        "the folder of --gallery does not exist": [
            *files,
            "--split",
            "all",
            "--gallery",
            str(tmp_path / "no" / "g.png"),
        ],
        "--gallery: .* must end in one of": [*files, "--split", "all", "--gallery", str(tmp_path / "g.doc")],
        "keeps no absolute paths.*data.image_map=FILE data.captions=FILE": ["data.image_map=a.json", "data.captions=b"],
        "'data.captions': file not found": [files[0], "data.captions=b.json"],
    }
    for message, arguments in wrong.items():
        with pytest.raises(UserError, match=message):
            eval_vqa.main([*checkpoint, *arguments])
    assert loaded == []  # said before the model is loaded


def many(photos, texts=0):
    entries = [
        Entry("one" if photos // 2 > ID else "two", "t", (Turn("<|extra_0|>?", ("a",), images=(ID,)),))
        for ID in range(photos)
    ]
    return entries + [Entry("text", "t", (Turn(f"Say {number}", ("a",)),)) for number in range(texts)]


def test_a_limit_draws_from_all_sources_the_same_every_time():
    entries = many(100, texts=20)
    kept = sample_photos(entries, 20, seed=0)
    assert kept == sample_photos(entries, 20, seed=0) != sample_photos(entries, 20, seed=1)
    assert sum(bool(entry.images) for entry in kept) == 20
    assert sum(not entry.images for entry in kept) == 4  # their share
    assert {entry.source for entry in kept} == {"one", "two", "text"}
    assert kept == sorted(kept, key=entries.index)
    assert sample_photos(entries, 1000, seed=0) == entries
    assert len(sample_photos(many(0, texts=20), 5, seed=0)) == 5
    pairs = [Entry("p", "t", (Turn("<|extra_0|><|extra_0|>?", ("a",), images=(ID, ID + 1)),)) for ID in range(0, 40, 2)]
    assert len(sample_photos(pairs, 6, seed=0)) == 3


def test_swapping_photos_does_not_go_through_all_of_them_for_each():
    """Counted, not timed: how many IDs are taken out of the list."""

    class Counting(list):
        taken = 0

        def __getitem__(self, index):
            Counting.taken += 1
            return super().__getitem__(index)

        def index(self, *_):
            raise AssertionError("a search through the whole list")

    IDs = Counting(range(1000))
    others = [_other_photos((ID,), IDs)[0] for ID in range(1000)]
    assert sorted(others) == list(range(1000))
    assert Counting.taken <= 20_000  # a binary search each; going through all would be 1,000,000
