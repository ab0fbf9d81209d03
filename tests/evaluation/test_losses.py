"""Loss of references against transformers' own loss of one sequence at a time."""

import math

import pytest
import torch

from dataset.image_caption_dataset import entry_messages
from dataset.records import Entry, Turn, read_records
from errors import UserError
from evaluation.losses import Loss, answer_losses
from evaluation.runner import list_questions
from evaluation.scores import score_pass
from model.checkpoint import load_checkpoint
from tests.tiny import fill_trained
from visual.photo import load_image

TAG = "<|extra_0|>"
ENTRIES = [
    Entry("one", "colour", (Turn(f"{TAG}\nWhich colour?", ("red", "a dark red", "crimson"), images=(0,)),)),
    Entry("one", "number", (Turn(f"{TAG}\nWhich number?", ("0", "0"), images=(0,)),)),
    Entry("two", "colour", (Turn(f"{TAG}\nWhich colour?", ("green",), images=(1,)),)),
    Entry(
        "two",
        "talk",
        (
            Turn(f"{TAG}\nIs it red?", ("no", "not at all"), images=(1,)),
            Turn(f"Like {TAG}?", ("yes", "yes, that"), "colour", images=(2,)),
        ),
    ),
    Entry("two", "talk", (Turn("Say hello", ("hello", "hi")),)),
]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint.parent.parent


@pytest.fixture(scope="module")
def model(tiny_checkpoint, folder):
    model = load_checkpoint(tiny_checkpoint, overrides={"model_root": folder})
    fill_trained(model)
    return model


@pytest.fixture
def photos(folder):
    return read_records(folder / "image_map.json", folder / "captions.json")[0]


@torch.no_grad()
def one_by_one(model, question, photos):
    """Summed loss and tokens of each reference, as an ordinary sequence in transformers' classes."""
    chat = model.processor.chat
    entry, count = question.entry, question.turn + 1
    earlier = [turn.answers[0] for turn in entry.turns[: question.turn]]
    found = []
    for reference in question.references:
        messages = entry_messages(entry, chat, [*earlier, reference])[: 2 * count]
        ids, _ = chat.render(messages)
        prompt, _ = chat.render(messages[:-1])
        end = len(ids) - len(chat.newline_ids)
        labels = [-100] * len(prompt) + ids[len(prompt) : end] + [-100] * len(chat.newline_ids)
        pixels = [model.processor.pixels(load_image(photos[ID].path), chat.plan) for ID in question.images]
        loss = model(torch.cat(pixels) if pixels else None, torch.tensor([ids]), torch.tensor([labels])).loss
        found.append((loss.item() * (end - len(prompt)), end - len(prompt)))
    return found


def test_losses_are_those_of_separate_sequences(model, photos):
    """Tolerance 1e-4: float32, sums of 30 tokens in another order."""
    losses = answer_losses(model, list_questions(ENTRIES), photos)
    expected = {}
    for question in list_questions(ENTRIES):
        for loss, tokens in one_by_one(model, question, photos):
            kind = (question.type, question.entry.source)
            before = expected.get(kind, (0.0, 0))
            expected[kind] = (before[0] + loss, before[1] + tokens)
    assert set(losses) == {("colour", "one"), ("colour", "two"), ("number", "one"), ("talk", "two")}
    for kind, loss in losses.items():
        assert loss.tokens == expected[kind][1]
        assert loss.summed == pytest.approx(expected[kind][0], rel=1e-4)


def test_scores_weigh_tokens(run):
    losses = {("colour", "demo"): Loss(2.0, 4), ("text", "demo"): Loss(9.0, 3), ("text", "other"): Loss(1.0, 1)}
    entries = [
        Entry(source, kind, (Turn("Say it", ("x",)),))
        for kind, source in [("colour", "demo"), ("text", "demo"), ("text", "other")]
    ]
    result = score_pass(run(entries).answers["trained"], losses)
    assert result.by_type["colour"].loss == 0.5
    assert result.by_type["text"].loss == 2.5
    assert result.by_source["demo"].loss == pytest.approx(11 / 7)
    assert result.overall.loss == 1.5
    assert result.overall.perplexity == pytest.approx(math.exp(1.5))
    assert math.isfinite(Loss(1e6, 1).perplexity)


def test_an_unreadable_photo_is_named(model, photos, tmp_path):
    (tmp_path / "cut.png").write_bytes(photos[1].path.read_bytes()[:40])
    broken = photos | {1: photos[1].__class__(1, "k", "cut.png", tmp_path / "cut.png")}
    with pytest.raises(UserError, match=r"cut\.png"):
        answer_losses(model, list_questions(ENTRIES), broken)
