"""Where the model looked: weights and gradients beside independent computations, and their places in the photo."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import answering.heatmap as heatmap
from answering.answer import Answerer
from answering.heat_picture import draw_heatmap, draw_heatmaps
from answering.heatmap import Heatmap, answer_words, find_word
from config import Generate
from errors import UserError
from tests.answering.dialogues import build
from tests.tiny import write_qwen

KINDS = ("qwen2-tied", "qwen3-untied", "llama-tied", "qwen1", "sliding")
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # the second layer's
ANSWER = "a red cat"


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PHOTO = noise(80, 60)


@pytest.fixture(scope="module", params=KINDS)
def model(request, backbones, tmp_path_factory):
    if request.param == "sliding":
        return build(backbones, write_qwen(tmp_path_factory.mktemp("sliding"), **WINDOW))
    return build(backbones, request.param)


@pytest.fixture(scope="module")
def plain(backbones):
    return build(backbones)


def ask(text="What is it?", *photos):
    return [{"role": "user", "content": text, "images": list(photos)}]


def relevance(monkeypatch, name):
    """Make `heatmap.<name>` note its arguments and result."""
    noted, original = [], getattr(heatmap, name)
    monkeypatch.setattr(heatmap, name, lambda *args: noted.append((args, original(*args))) or noted[-1][1])
    return noted


def test_attention_is_that_of_transformers(model, monkeypatch):
    noted = relevance(monkeypatch, "_attention")
    Answerer(model).look(PHOTO, ask(), ANSWER, method="attention")
    [((_, embeddings, _, targets, layers), found)] = noted
    assert layers == {0, 1}
    implementation = model.LLM.config._attn_implementation
    try:
        model.LLM.set_attn_implementation("eager")
        with torch.no_grad():
            output = model.LLM(inputs_embeds=embeddings, output_attentions=True)
    finally:
        model.LLM.set_attn_implementation(implementation)
    rows = torch.stack(output.attentions)[:, 0][:, :, targets - 1]  # (layers, H, S, T)
    assert len(targets) == len(model.processor.chat.encode_text(ANSWER))
    assert torch.allclose(rows.sum(-1), torch.ones(rows.shape[:3]), atol=1e-6)
    # 1e-5: both are softmaxes in float32, of scores summed in another order
    assert torch.allclose(found, rows.mean((0, 1, 2)), atol=1e-5)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)  # over photo and text


def test_chosen_layers(plain):
    request = Answerer(plain).request(PHOTO, ask())
    both, *single = (
        heatmap.look(plain, request, ANSWER, method="attention", layers=layers)[0].values for layers in (None, [0], [1])
    )
    assert not np.allclose(*single, atol=1e-6, equal_nan=True)
    assert np.nanmin(np.maximum(*single) - both) > -1e-4  # a mean, each map being normalised
    for layers in ([], [2], [-1]):
        with pytest.raises(UserError, match="the language model has the layers 0 to 1"):
            heatmap.look(plain, request, ANSWER, layers=layers)


def test_gradient_is_that_of_finite_differences(model, monkeypatch):
    noted = relevance(monkeypatch, "_gradient")
    Answerer(model).look(PHOTO, ask(), ANSWER)
    [((_, embeddings, ids, targets, _), found)] = noted
    wide = model.language_model.double()
    try:
        inputs = embeddings.double()

        def score(rows):
            """Log-probability of the answer, by transformers' own forward pass."""
            with torch.no_grad():
                logits = wide(inputs_embeds=rows, attention_mask=torch.ones_like(ids)).logits
            return -cross_entropy(logits[0, targets - 1], ids[0, targets], reduction="sum").item()

        place = (ids[0] == model.processor.chat.image_token_id).nonzero().flatten()[4].item()
        step, total = 1e-4, 0.0
        for column in range(inputs.shape[-1]):
            ends = []
            for sign in (1, -1):
                moved = inputs.clone()
                moved[0, place, column] += sign * step
                ends.append(score(moved))
            total += abs((ends[0] - ends[1]) / (2 * step) * inputs[0, place, column].item())
    finally:
        model.language_model.float()
    # transformers' norms round to float32 even here: 1e-7 of a score of 10, over a step of 2e-4
    assert found[place].item() == pytest.approx(total, rel=2e-2)


def plant(model, patch):
    """Let the answer depend on one patch: the other patches become zeros before the language model."""
    project = model.project

    def only(features):
        kept = torch.zeros(1, features.shape[1], 1)
        kept[:, patch] = 1
        return project(features) * kept

    return only


@pytest.mark.parametrize("patch", [0, 5, 14])
def test_the_one_patch_that_counts_is_found(plain, monkeypatch, patch):
    monkeypatch.setattr(plain, "project", plant(plain, patch))
    [found] = Answerer(plain).look(noise(160, 80), ask(), ANSWER)
    row, column = divmod(patch + 1, 4)  # the first patch is dropped
    x, y = found.peak
    assert (int(4 * x), int(4 * y)) == (column, row)
    rows, columns = found.values.shape
    assert columns == 2 * rows
    inside = found.values[row * rows // 4 : (row + 1) * rows // 4, column * columns // 4 : (column + 1) * columns // 4]
    assert inside.sum() == pytest.approx(1, abs=1e-5)


def test_values_sum_to_one_and_the_dropped_patch_is_unseen(plain):
    [found] = Answerer(plain).look(PHOTO, ask(), ANSWER)
    rows, columns = found.values.shape
    assert (rows, columns) == (192, 256)
    assert np.nansum(found.values) == pytest.approx(1, abs=1e-5)
    unseen = np.isnan(found.values)
    assert unseen[: rows // 4, : columns // 4].all()
    assert unseen.sum() == rows * columns // 16


def test_all_photos_share_one_scale(plain):
    messages = [*ask("This?", PHOTO), {"role": "assistant", "content": "A"}, *ask("And that?", noise(30, 90, 1))]
    boxed = [*messages[:2], messages[2] | {"box": (0, 0, 30, 45)}]
    for dialogue, shapes in ((messages, [(192, 256), (256, 85)]), (boxed, [(192, 256), (256, 85), (256, 171)])):
        maps = Answerer(plain).look(None, dialogue, ANSWER)
        assert [found.values.shape for found in maps] == shapes
        assert sum(np.nansum(found.values) for found in maps) == pytest.approx(1, abs=1e-5)


def test_earlier_answers_are_not_explained(plain, monkeypatch):
    noted = relevance(monkeypatch, "_gradient")
    dialogue = [*ask("This?", PHOTO), {"role": "assistant", "content": "A long answer"}, *ask("Why?")]
    Answerer(plain).look(None, dialogue, "so")
    [((_, _, ids, targets, _), _)] = noted
    assert plain.processor.tokenizer.decode(ids[0, targets]) == "so"


@pytest.mark.parametrize("tiles", [2, 4])
def test_tiles_add_to_the_whole_photo(backbones, tiles, monkeypatch):
    model = build(backbones, visual={"tiles": tiles})
    photo = noise(240, 120)
    plan = model.processor.plan(*photo.size)
    assert (plan.tile_rows, plan.tile_columns) == (1, 2)
    by_token = np.zeros(plan.tokens)
    monkeypatch.setattr(heatmap, "_gradient", lambda model, rows, ids, *_: _at_photo(model, ids, by_token))
    by_token[15 + 15 + 2] = 1  # fourth patch of the first row of the second tile
    [found] = Answerer(model).look(photo, ask(), ANSWER)
    rows, columns = found.values.shape
    assert found.values[: rows // 4, 7 * columns // 8 :].sum() == pytest.approx(1, abs=1e-5)
    unseen = np.isnan(found.values)  # what neither the whole photo nor its first tile shows
    assert unseen[: rows // 4, : columns // 8].all()
    assert unseen.sum() == rows * columns // 32


def _at_photo(model, ids, values):
    result = torch.zeros(ids.shape[1])
    result[ids[0] == model.processor.chat.image_token_id] = torch.from_numpy(values).float()
    return result


def test_squares_of_pixel_shuffle(backbones, monkeypatch):
    model = build(backbones, projector={"kind": "pixel_shuffle", "factor": 3})
    values = np.array([4.0, 0, 0, 1])  # 4 × 4 patches: a square of 3 × 3, and what is left at the edges
    monkeypatch.setattr(heatmap, "_gradient", lambda model, rows, ids, *_: _at_photo(model, ids, values))
    [found] = Answerer(model).look(noise(80, 80), ask(), ANSWER)
    assert np.nansum(found.values[:192, :192]) == pytest.approx(0.8, abs=1e-5)
    assert found.values[192:, 192:].sum() == pytest.approx(0.2, abs=1e-5)
    assert np.isnan(found.values).sum() == 64 * 64


def test_a_resampler_has_no_places(backbones):
    model = build(backbones, projector={"kind": "resampler", "queries": 5, "heads": 4})
    with pytest.raises(UserError, match=r"'projector\.kind' is resampler, whose tokens have no place"):
        Answerer(model).look(PHOTO, ask(), ANSWER)


def test_the_margins_that_a_center_crop_leaves_out_are_unseen(plain, monkeypatch):
    monkeypatch.setattr(plain.processor.transform, "seen", lambda width, height: (20.0, 0.0, 60.0, 40.0))
    [found] = Answerer(plain).look(noise(80, 40), ask(), ANSWER)
    unseen = np.isnan(found.values)
    assert unseen[:, :64].all()
    assert unseen[:, -64:].all()
    assert not unseen[64:, 64:-64].any()


def test_pixels_that_no_patch_reads_are_unseen(plain, monkeypatch):
    monkeypatch.setattr(type(plain.encoder), "size", (64, 64))  # 4 × 14 px are read of 64
    places = torch.arange(16).view(4, 4)
    picture = heatmap.Picture(noise(64, 64), plain.processor.chat.plan, "")
    values = heatmap._photo_map(plain, picture, places.numpy() - 1, np.ones(15))
    assert np.isnan(values[224:]).all()
    assert np.isnan(values[:, 224:]).all()
    assert np.nansum(values) == pytest.approx(15)


def test_words_are_whole_tokens_with_their_characters(plain, monkeypatch):
    answer = " A red-brown cat, 12 m. "
    words = answer_words(plain, answer)
    assert [word.text for word in words] == ["A", "red", "brown", "cat", "12", "m"]
    assert all(answer[word.start : word.end] == word.text for word in words)
    assert answer_words(plain, "...") == []
    chinese = answer_words(plain, "红色的圆")  # three tokens a character here
    assert [(word.text, word.start) for word in chinese] == [("红", 0), ("色", 1), ("的", 2), ("圆", 3)]
    noted = relevance(monkeypatch, "_gradient")
    for text in ("cat", "12"):
        Answerer(plain).look(PHOTO, ask(), answer, find_word(answer, text))
        ((_, _, ids, targets, _), _) = noted.pop()
        assert plain.processor.tokenizer.decode(ids[0, targets]) == text


def test_another_word_has_another_map(plain):
    first, second = (
        Answerer(plain).look(PHOTO, ask(), ANSWER, find_word(ANSWER, word))[0].values for word in ("red", "cat")
    )
    assert not np.allclose(first, second, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_looking_changes_no_answer_and_keeps_no_gradient(plain, method):
    answerer, settings = Answerer(plain), Generate(max_new_tokens=8)
    before = answerer.answer(PHOTO, "What is it?", settings)
    answerer.look(PHOTO, ask(), ANSWER, method=method)
    assert answerer.answer(PHOTO, "What is it?", settings) == before
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_the_photo_is_not_encoded_again(plain, monkeypatch):
    answerer = Answerer(plain)
    [expected] = Answerer(plain).look(PHOTO, ask(), ANSWER)
    answerer.answer(PHOTO, "What is it?", Generate(max_new_tokens=2))
    monkeypatch.setattr(plain, "encode_image", lambda _: pytest.fail("the photo was encoded again"))
    [found] = answerer.look(PHOTO, ask(), ANSWER)
    assert np.array_equal(found.values, expected.values, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda answerer: answerer.look(None, ask(), ANSWER), "there is no photo"),
        (lambda answerer: answerer.look(PHOTO, ask(), " "), "is empty: there is nothing to explain"),
        (lambda answerer: answerer.look(PHOTO, ask(), ANSWER, (4, 4)), "between the characters 4 and 4"),
        (lambda answerer: answerer.look(PHOTO, ask(), ANSWER, method="magic"), "not one of gradient, attention"),
        (lambda answerer: answerer.look(PHOTO, ask(), "x" * 2000), "start a new dialogue"),
        (lambda answerer: find_word(ANSWER, "dog"), "'dog' is not in the answer, choose a word of it: a red cat"),
    ],
)
def test_what_cannot_be_explained_is_said(plain, call, problem):
    with pytest.raises(UserError, match=problem):
        call(Answerer(plain))


def test_the_picture_is_coloured_where_the_map_is_and_hatched_where_nothing_is_seen():
    values = np.zeros((64, 128), dtype=np.float32)
    values[32:, 64:] = 1
    values[:16, :16] = np.nan
    drawn = np.asarray(draw_heatmap(Heatmap(values, "gradient"), Image.new("RGB", (400, 200), (60, 90, 200)))).astype(
        int
    )
    assert drawn.shape == (200, 400, 3)
    assert (np.ptp(drawn[:90, 60:190], axis=-1) == 0).all()  # gray
    assert (drawn[120:, 220:, 0] - drawn[120:, 220:, 2] > 100).all()  # coloured
    assert {tuple(pixel) for pixel in drawn[:40, :40].reshape(-1, 3)} == {(255, 255, 255), (90, 90, 90)}
    both = draw_heatmaps([Heatmap(values, "gradient"), Heatmap(values / 4, "gradient")], [PHOTO, noise(2000, 1000)])
    assert both.size == (80 + 8 + 768, 384)
    weak = np.asarray(both)[250:380, 88 + 400 :].astype(int)
    assert (np.ptp(weak, axis=-1) < 100).all()  # one scale for all photos
