"""Photos in any turn, several in a turn, with and without tiles: the answers are those of transformers' `generate`."""

import numpy as np
import pytest
import torch
from PIL import Image

from answering.answer import Answerer
from config import Generate
from errors import UserError
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SETTINGS = Generate(max_new_tokens=12)
SQUARE, WIDE, TALL, SMALL = picture(112, 112, 0), picture(168, 60, 1), picture(60, 130, 2), picture(40, 30, 3)


@pytest.fixture(scope="module", params=["qwen2-tied", "qwen3-untied", "qwen1-short"])
def llm(request):
    return request.param


@pytest.fixture(scope="module", params=[0, 4], ids=["whole", "tiles"])
def model(request, llm, backbones):
    config = tiny_config(backbones, llm={"path": str(backbones / llm)}, visual={"tiles": request.param})
    model = MMultiModal.from_config(config).eval()
    fill_trained(model)
    return model


def user(text, *images):
    return {"role": "user", "content": text, "images": list(images)}


def assistant(text):
    return {"role": "assistant", "content": text}


DIALOGUES = {
    "two in one turn": [user("Same?", SQUARE, WIDE)],
    "one twice": [user("Same?", TALL, TALL)],
    "in a later turn": [user("Hello"), assistant("Hi."), user("What is it?", WIDE)],
    "in every turn": [user("This?", SQUARE), assistant("A cat."), user("And these?", TALL, SMALL)],
    "text in between": [user("This?", TALL), assistant("A"), user("Sure?"), assistant("Yes"), user("这个？", SQUARE)],
}


def test_a_box_shows_the_part_after_the_last_photo(model):
    plain = [user("This?", WIDE, SQUARE), assistant("A"), user("It?", SQUARE.crop((10, 20, 90, 100)))]
    boxed = [user("This?", WIDE, SQUARE), assistant("A"), user("It?") | {"box": (10, 20, 90, 100)}]
    expected = Answerer(model).stream(None, plain, SETTINGS).rest()
    assert Answerer(model).stream(None, boxed, SETTINGS).rest() == expected
    again = [*boxed[:2], user("And it?") | {"box": (0.0, 0.0, 0.5, 0.5)}, assistant("B"), boxed[2]]
    sizes = [photo.box for photo in Answerer(model).request(None, again).photos if not isinstance(photo, Image.Image)]
    assert sizes == [(0.0, 0.0, 0.5, 0.5), (10, 20, 90, 100)]  # both of the last photo, not of the part
    [reply] = Answerer(model).answer_many([Answerer(model).request(None, boxed)], SETTINGS)
    assert reply == expected


def test_a_box_needs_a_photo_and_lies_inside(model):
    with pytest.raises(UserError, match="a box needs a photo"):
        Answerer(model).stream(None, [user("It?") | {"box": (0, 0, 9, 9)}])
    with pytest.raises(UserError, match="ends outside the photo of 40×30"):
        Answerer(model).stream(SMALL, [user("It?") | {"box": (0, 0, 50, 9)}]).rest()


def photos_of(dialogue):
    return [photo for message in dialogue for photo in message.get("images", ())]


def prompt_of(model, dialogue):
    """The ids of the whole prompt."""
    chat, messages = model.processor.chat, []
    for message in dialogue:
        if message["role"] == "assistant":
            messages.append(chat.answer(message["content"]))
        else:
            plans = [model.processor.plan(*photo.size) for photo in message["images"]]
            messages.append(chat.typed_question(message["content"], plans))
    return chat.render(messages)[0]


def expected_answer(model, dialogue):
    """What transformers' `generate` says to the whole prompt, whose crops are made without `Processor`."""
    chat, transform, most = model.processor.chat, model.processor.transform, model.processor.tiles
    grids = [transform.tiles(*photo.size, most) if most else (0, 0) for photo in photos_of(dialogue)]
    crops = [transform.crops(photo, *grid) for photo, grid in zip(photos_of(dialogue), grids, strict=True)]
    ids = torch.tensor([prompt_of(model, dialogue)])
    new = model.generate(torch.cat(crops), ids, max_new_tokens=12, do_sample=False)[0].tolist()
    new = [token for token in new if token not in chat.stop_ids]
    return model.processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def say(answerer, dialogue):
    return answerer.stream(None, dialogue, SETTINGS).rest().text


@pytest.mark.parametrize("name", DIALOGUES)
def test_answers_are_those_of_generate(model, name):
    assert say(Answerer(model), DIALOGUES[name]) == expected_answer(model, DIALOGUES[name])


def test_one_answerer_for_all_dialogues_gives_the_same(model):
    shared = Answerer(model)
    for name in [*DIALOGUES, *reversed(DIALOGUES)]:
        assert say(shared, DIALOGUES[name]) == expected_answer(model, DIALOGUES[name]), name


def test_the_photos_make_the_answer(model):
    """Otherwise the comparisons above would prove nothing about photos."""
    pairs = [(SQUARE, WIDE), (WIDE, SQUARE), (SQUARE, SQUARE), (TALL, SMALL)]
    assert len({say(Answerer(model), [user("?", *pair)]) for pair in pairs}) > 1


def test_tiles_follow_from_the_shape(llm, backbones):
    config = tiny_config(backbones, llm={"path": str(backbones / llm)}, visual={"tiles": 4})
    processor = MMultiModal.from_config(config).processor
    plans = [processor.plan(*photo.size) for photo in (SQUARE, WIDE, TALL)]
    grids = [(plan.tile_rows, plan.tile_columns) for plan in plans]
    assert grids == [(2, 2), (1, 3), (2, 1)]
    assert processor.plan(*SMALL.size).crops == 1


@pytest.fixture
def counted(model, monkeypatch):
    """An answerer, the tokens each of its passes read, and the crops each call of the encoder saw."""
    answerer = Answerer(model)
    read, seen = [], []
    decode, encode = model.decode, model.encode_image
    monkeypatch.setattr(model, "decode", lambda rows, cache: read.append(rows.shape[1]) or decode(rows, cache))
    monkeypatch.setattr(model, "encode_image", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    return answerer, read, seen


@pytest.fixture
def dynamic(model):
    """Qwen v1 reads a prompt anew where its length changes the rotary base (`prefix_key`)."""
    return lambda *dialogues: len({model.language_model.prefix_key(len(prompt_of(model, d))) for d in dialogues}) > 1


def test_a_new_photo_in_a_later_turn_is_all_that_is_read(model, counted, dynamic):
    answerer, read, seen = counted
    first = [user("This?", SQUARE)]
    said = say(answerer, first)
    kept = len(answerer._prefixes.sequences[-1].ids)  # the prompt and all tokens of the answer but the last
    second = [*first, assistant(said), user("And this?", WIDE)]
    expected = expected_answer(model, second)
    read.clear(), seen.clear()
    assert say(answerer, second) == expected
    assert seen == [model.processor.plan(*WIDE.size).crops]
    prompt = prompt_of(model, second)
    if dynamic(first, second):
        assert read[0] == len(prompt)
    else:
        # the answer may tokenise anew, so it may be read again; the first photo and its question are not
        assert len(prompt) - kept <= read[0] <= len(prompt) - len(prompt_of(model, first)) + len(said.encode())
    assert set(read[1:]) == {1}


def test_a_changed_photo_is_read_from_its_place_on(model, counted, dynamic):
    answerer, read, seen = counted
    before = [user("This?", SQUARE), assistant("A cat."), user("And this?", WIDE)]
    after = [*before[:2], user("And this?", WIDE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
    say(answerer, before)
    expected = expected_answer(model, after)
    read.clear(), seen.clear()
    assert say(answerer, after) == expected
    assert seen == [model.processor.plan(*WIDE.size).crops]
    prompt = prompt_of(model, after)
    plans = [model.processor.plan(*SQUARE.size), model.processor.plan(*WIDE.size)]
    start = model.processor.chat.photo_spans(prompt, plans)[1][0]
    assert read[0] == (len(prompt) if dynamic(before, after) else len(prompt) - start)


def test_a_changed_first_photo_is_read_again_with_all_behind_it(model, counted):
    answerer, read, seen = counted
    before = [user("Same?", SQUARE, WIDE)]
    after = [user("Same?", SQUARE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), WIDE)]
    say(answerer, before)
    expected = expected_answer(model, after)
    read.clear(), seen.clear()
    assert say(answerer, after) == expected
    prompt = prompt_of(model, after)
    assert read[0] == len(prompt) - prompt.index(model.processor.chat.image_token_id)
    assert seen == [model.processor.plan(*SQUARE.size).crops]  # the second keeps what the encoder said of it


def test_a_photo_of_another_shape_in_the_same_place(model, counted):
    """With tiles the placeholders differ in number, and part of them are those of the kept photo."""
    answerer = counted[0]
    for photos in [(SQUARE,), (TALL,), (SQUARE, TALL), (SQUARE,), (SMALL, SQUARE), (SMALL,)]:
        dialogue = [user("What?", *photos)]
        assert say(answerer, dialogue) == expected_answer(model, dialogue), [photo.size for photo in photos]


def test_a_photo_twice_is_encoded_once(model, counted):
    answerer, _, seen = counted
    say(answerer, [user("Same?", TALL, TALL), assistant("Yes."), user("And now?", TALL)])
    assert seen == [model.processor.plan(*TALL.size).crops]


def test_the_image_argument_comes_before_the_first_messages_own(model):
    dialogue = [user("Same?", WIDE)]
    expected = expected_answer(model, [user("Same?", SQUARE, WIDE)])
    assert "".join(Answerer(model).stream(SQUARE, dialogue, SETTINGS)) == expected


def test_more_photos_than_the_context_holds(model):
    answerer = Answerer(model)
    dialogue = [user("What?", SQUARE)]
    expected = say(answerer, dialogue)
    of_photos = 100 * model.processor.plan(*SQUARE.size).tokens
    with pytest.raises(UserError, match=rf"\({of_photos} of its photos\), the language model reads 1024"):
        say(answerer, [*dialogue, assistant("A"), user("And these?", *[SQUARE] * 99)])
    assert say(answerer, dialogue) == expected
