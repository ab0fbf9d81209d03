"""Photos of one colour each, questions on them, and evaluations with a model that reads the colour off the photo."""

import pytest
from PIL import Image

from dataset.records import Entry, Photo, Turn
from evaluation.passes import evaluate
from evaluation.predictions import Predictions
from tests.evaluation.colours import COLOURS, ColourModel


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


@pytest.fixture
def run(photos, tmp_path, monkeypatch):
    """`run(entries, model, …)`: an evaluation; by default only with the own photo."""
    monkeypatch.setattr("evaluation.passes.Answerer", lambda model: model)
    monkeypatch.setattr("evaluation.passes.answer_losses", lambda *_: {})

    def evaluate_entries(entries, model=None, baselines=(), train=(), settings=None, folder="eval", **options):
        with Predictions(tmp_path / folder, settings or {"questions": "q"}) as predictions:
            return evaluate(model or ColourModel(), photos, entries, list(train), predictions, baselines, **options)

    return evaluate_entries
