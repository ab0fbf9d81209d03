"""Which questions are asked in which order, with which photos and earlier turns in the prompt."""

import itertools

import pytest

from dataset.records import Entry, Turn
from evaluation.runner import (
    ask,
    list_questions,
    photos_digest,
    questions_digest,
    sample_photos,
    turn_request,
    without_photos,
)
from tests.evaluation.colours import COLOURS, ColourModel


def asked(entries, photos, choose=tuple):
    """The model after all questions, and (question, photos in its prompt)."""
    model = ColourModel()
    replies = ask(model, list_questions(entries), choose, lambda ID: photos[ID].path)
    return model, [(question, images) for question, images, _ in replies]


def test_questions_of_one_photo_come_in_a_row(photos, entries):
    model, _ = asked(entries, photos)
    shown = [colours for _, colours, _ in model.calls]
    changes = sum(before != after for before, after in itertools.pairwise(shown))
    assert changes == 4  # four photos and one text
    assert [(question, earlier) for question, _, earlier in model.calls][:3] == [
        ("<|extra_0|>\nColour?", 0),
        ("<|extra_0|>Red?", 0),
        ("Sure?", 2),  # after the first question and its true answer
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_photos_of_later_turns_are_shown_from_their_turn_on(photos, swapped):
    turns = [
        Turn("Hello <|extra_0|>", ("Hi",)),
        Turn("<|extra_0|>Colour? <|extra_0|>", ("green",), images=(1,)),
        Turn("Sure?", ("yes",)),
        Turn("<|extra_0|><|extra_0|>Same?", ("no",), images=(0, 1)),
    ]
    other = {0: 2, 1: 3}
    choose = (lambda own: tuple(other[ID] for ID in own)) if swapped else tuple
    model, found = asked([Entry("demo", "d", tuple(turns))], photos, choose)
    one, two = (3, 2) if swapped else (1, 0)
    shown = [(), (one,), (one,), (one, two, one)]
    assert [images for _, images in found] == shown
    assert [question.text for question, _ in found] == ["Hello <|extra_0|>", "Colour? <|extra_0|>", "Sure?", "Same?"]
    assert [question.images for question, _ in found] == [(), (1,), (1,), (1, 0, 1)]
    colours = list(COLOURS.values())
    calls = zip(model.calls, turns, shown, strict=True)
    assert all(call == (turn.question, [colours[ID] for ID in IDs], 2 * n) for n, (call, turn, IDs) in enumerate(calls))
    assert model.places == [[0], [0, 1], [0, 1, 0], [0, 1, 0, 2]]


def test_photos_left_out_leave_no_tag_behind(photos):
    turns = (
        Turn("<|extra_0|>\nLook at <|extra_0|>\nthis.", ("yes",), images=(0, 1)),
        Turn("<|extra_0|> is text here", ("no",)),
    )
    entry = Entry("demo", "d", turns)
    bare = without_photos(entry)
    assert [turn.question for turn in bare.turns] == ["Look at this.", "<|extra_0|> is text here"]
    assert bare.images == ()
    assert [turn.answers for turn in bare.turns] == [("yes",), ("no",)]
    assert turn_request(bare, 1, [], ColourModel().chat).messages[::2] == [
        ("Look at this.", 0),
        ("<|extra_0|> is text here", 0),
    ]
    model, found = asked([entry], photos, lambda own: ())
    assert [colours for _, colours, _ in model.calls] == [[], []]
    assert [images for _, images in found] == [(), ()]


def test_an_unreadable_photo_is_named(photos, entries):
    photos[0].path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"red\.png"):
        asked(entries, photos)


def test_the_digest_sees_all_that_is_asked(photos, entries):
    def digest(entries):
        return questions_digest(list_questions(entries), photos)

    def colour(question="<|extra_0|>\nColour?", answer="red", image=0, kind="colour"):
        return Entry("demo", kind, (Turn(question, (answer,), images=(image,)),))

    assert digest(entries) == digest([colour(), *entries[1:]])
    others = [colour(question="<|extra_0|>Colour?"), colour(answer="Red"), colour(image=1), colour(kind="hue")]
    digests = {digest([other, *entries[1:]]) for other in others} | {digest(entries), digest(entries[1:])}
    assert len(digests) == 6


def test_other_photos_of_the_same_names_have_another_digest(photos, entries):
    questions = list_questions(entries)
    before = photos_digest(questions, photos)
    assert photos_digest(questions, photos) == before
    photos[0].path.write_bytes(photos[0].path.read_bytes() + b"x")
    changed = photos_digest(questions, photos)
    photos[0].path.unlink()
    assert len({before, changed, photos_digest(questions, photos)}) == 3


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
