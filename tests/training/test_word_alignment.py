"""The alignment of a new projector with words: by its definition, learned, and only at the start of a new run."""

import pytest
import torch
from PIL import Image

from dataset.records import Entry, Photo, Turn
from errors import UserError
from model.model import MMultiModal
from tests.tiny import tiny_config
from tests.training.runs import weights
from training import word_alignment
from training.dry_run import describe_run
from training.loop import Trainer
from training.word_alignment import WordScores, align_words, choose_photos, telling_words, words_of_photos
from visual.web import WebError

TAG = "<|extra_0|>"
COLOURS = {"red": "r", "green": "g", "blue": "b"}  # the tokens of the tiny tokenizer are letters


def question(ID, answer, more=()):
    return Entry("s", "s", (Turn(f"{TAG}\nWhat?", (answer,), images=(ID, *more)),))


@pytest.fixture
def coloured(backbones, tmp_path):
    """A model, photos of one colour each by ID, and what is answered about them; "x" is in every answer."""
    torch.manual_seed(0)
    model = MMultiModal.from_config(tiny_config(backbones))
    photos, entries = {}, []
    for ID, name in enumerate([*COLOURS] * 10):
        shade = Image.new("RGB", (60, 60), name)
        shade.putpixel((ID, ID), (9 * ID, 0, 0))  # no two photos are equal
        shade.save(tmp_path / f"{ID}.png")
        photos[ID] = Photo(ID, f"{ID}", f"{ID}.png", tmp_path / f"{ID}.png")
        entries.append(question(ID, f"x{COLOURS[name]}"))
    return model, photos, entries


def test_the_words_are_those_of_some_photos_but_not_of_most(coloured):
    model, photos, entries = coloured
    encode = model.processor.chat.encode_text
    several = [*entries, question(0, "z", more=(1,)), Entry("s", "s", (Turn("Who?", ("z",)),)), question(3, "rq")]
    words = words_of_photos(model, several, photos)
    assert words[0] == {*encode("xr")}
    assert words[3] == {*encode("xrq")}
    assert telling_words(words) == sorted(token for letter in "rgb" for token in encode(letter))
    hundred = {
        ID: {1, 2 if ID < 50 else 3, 4 if ID < 51 else 5, 6 if ID < 8 else 7, 8 if ID < 7 else 9} for ID in range(100)
    }
    assert telling_words(hundred) == [2, 3, 5, 6]


def test_scores_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    vectors, shares = torch.randn(5, 8, generator=generator), torch.rand(5, generator=generator)
    photos = [torch.randn(count, 8, generator=generator) for count in (3, 1, 4)]
    scores = WordScores(vectors, shares)
    centred = vectors.double() - vectors.double().mean(0)
    for row, tokens in zip(scores(photos).double(), photos, strict=True):
        for column, word in enumerate(centred):
            alike = [8.0 * (one @ word / one.norm() / word.norm()) for one in tokens.double()]
            mean = sum(value.exp() for value in alike) / len(alike)
            expected = mean.log() + (shares[column].double() / (1 - shares[column].double())).log()
            assert row[column].item() == pytest.approx(expected.item(), abs=1e-5)  # float32 against float64


def test_tokens_come_to_show_the_words_of_photos_never_seen(coloured):
    model, photos, entries = coloured
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.feature_proj.requires_grad_(False)
    state = torch.get_rng_state()
    sentence = align_words(model, photos, entries[:24], passes=900, seed=0, workers=0)
    assert torch.equal(state, torch.get_rng_state())
    assert "900 passes over 24 photos and 3 words" in sentence
    assert not any(parameter.requires_grad for parameter in model.feature_proj.parameters())
    inside = {name for name, _ in model.named_parameters() if name.startswith("feature_proj.")}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in inside), name
    ids = [model.processor.chat.encode_text(letter)[0] for letter in COLOURS.values()]
    table = model.LLM.get_input_embeddings().weight.detach()
    words = torch.nn.functional.normalize(table[ids] - table[ids].mean(0), dim=1)
    for ID in range(24, 30):
        rows = torch.cat(list(word_alignment.encoded_photos(model, [photos[ID]], 0)))
        tokens = model.project(rows.float()).detach().flatten(0, 1)
        assert (tokens @ words.T).logsumexp(0).argmax() == ID % 3
        # the mean of logarithms is within a fifth, because the norm is one of two aims
        assert (tokens.norm(dim=1).log().mean() - table[ids].norm(dim=1).log().mean()).abs() < 0.2


def test_unreadable_photos_are_left_out(coloured):
    model, photos, entries = coloured
    photos[5].path.write_bytes(b"no photo")
    assert "over 29 photos" in align_words(model, photos, entries, passes=1, seed=0, workers=0)
    for photo in photos.values():
        photo.path.write_bytes(b"no photo")
    assert "(0 readable photos" in align_words(model, photos, entries, passes=1, seed=0, workers=0)


def test_unreadable_photos_are_left_out_with_tiles_too(backbones, coloured):
    _, photos, entries = coloured
    model = MMultiModal.from_config(tiny_config(backbones, visual={"tiles": 4}))
    photos[5].path.write_bytes(b"no photo")
    assert "over 29 photos" in align_words(model, photos, entries, passes=1, seed=0, workers=0)


def test_a_store_that_does_not_answer_ends_the_alignment(coloured, monkeypatch):
    model, photos, entries = coloured

    def silent(picture):
        raise WebError("no answer")

    monkeypatch.setattr("training.feature_cache.load_image", silent)
    for workers in (0, 1):
        with pytest.raises(WebError, match="^no answer$"):
            align_words(model, photos, entries, passes=1, seed=0, workers=workers)


def test_a_photo_may_have_no_telling_word(coloured):
    model, photos, entries = coloured
    sentence = align_words(model, photos, [question(0, "x"), *entries[1:]], passes=1, seed=0, workers=0)
    assert "over 30 photos and 3 words" in sentence


def test_no_telling_word_changes_nothing(coloured):
    model, photos, _ = coloured
    before = model.feature_proj.state_dict()["0.weight"].clone()
    sentence = align_words(model, photos, [question(ID, "yes") for ID in photos], passes=5, seed=0, workers=0)
    assert "the projector stays as it is" in sentence
    assert torch.equal(before, model.feature_proj.state_dict()["0.weight"])


def test_features_of_many_photos_are_a_random_part_of_them(coloured, monkeypatch):
    model, photos, entries = coloured
    crop_bytes = 2 * model.encoder.grid.rows * model.encoder.width
    monkeypatch.setattr(word_alignment, "FEATURE_BYTES", 7 * crop_bytes + 1)
    chosen = choose_photos(model, photos, entries, seed=0)
    assert len({photo.ID for photo in chosen}) == 7
    assert chosen == choose_photos(model, photos, entries, seed=0) != choose_photos(model, photos, entries, seed=1)


def test_only_a_new_run_is_aligned(configure, tmp_path, monkeypatch, capsys):
    def trainer(folder, *given, **train):
        settings = {"output_dir": str(tmp_path / folder), "trackers": [], "log_steps": 1, "workers": 0} | train
        return Trainer(configure(**settings), *given)

    plain, aligned = trainer("plain", max_steps=1), trainer("aligned", max_steps=1, word_alignment=2)
    assert "train.word_alignment: 2 passes over" in capsys.readouterr().out
    changed = {
        name
        for name, parameter in plain.model.named_parameters()
        if not torch.equal(parameter, aligned.model.get_parameter(name))
    }
    assert {name.partition(".")[0] for name in changed} == {"feature_proj"}
    folder = aligned.run()

    def fails(*_):
        raise UserError("aligned again")

    monkeypatch.setattr("training.build.align_words", fails)
    resumed = trainer("aligned", "auto", max_steps=2, word_alignment=2)
    after = weights(folder)
    for name, parameter in resumed.model.feature_proj.state_dict().items():
        assert torch.equal(parameter, after[f"feature_proj.{name}"] if f"feature_proj.{name}" in after else after[name])
    trainer("next", init_from=str(folder), max_steps=1, word_alignment=2)
    dry = trainer("other", None, False, True, max_steps=1, word_alignment=2)
    assert describe_run(dry).endswith(", and before it train.word_alignment, not measured here")
    dry = trainer("other", None, False, True, init_from=str(folder), max_steps=1, word_alignment=2)
    assert "word_alignment" not in describe_run(dry)
    with pytest.raises(UserError, match="aligned again"):
        trainer("new", max_steps=1, word_alignment=2)
