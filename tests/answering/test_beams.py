"""Beam search gives the answers of transformers' `generate` with `num_beams`, in any batch, and can be stopped."""

import itertools

import pytest
import torch

from answering.answer import Answerer
from answering.remote import RemoteAnswerer
from answering.request import make_prompt, read_picture
from config import Generate
from errors import UserError
from qwen.branches import BranchCache
from tests.answering.dialogues import alone, end_early, requests_of

THREE = Generate(max_new_tokens=8, num_beams=3)


def reference(model, request, settings):
    """Text of transformers' answer."""
    pictures = [read_picture(model, photo) for photo in request.photos]
    prompt = make_prompt(model, pictures, request.messages, settings.max_new_tokens)
    pixels = [model.processor.pixels(picture.image, picture.plan) for picture in pictures]
    tokens = model.generate(
        torch.cat(pixels) if pixels else None,
        torch.tensor([prompt.ids]),
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        repetition_penalty=settings.repetition_penalty,
    )[0].tolist()
    said = [*itertools.takewhile(lambda token: token not in model.processor.chat.stop_ids, tokens)]
    return model.processor.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("model", ["qwen2-tied", "qwen1", "sliding", "tiles"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        THREE,
        THREE.model_copy(update={"num_beams": 5, "repetition_penalty": 1.4}),
        THREE.model_copy(update={"length_penalty": 0.0}),
        THREE.model_copy(update={"length_penalty": 0.5}),
    ],
    ids=["three", "five with a penalty", "the likeliest", "in between"],
)
def test_answers_are_those_of_transformers(model, photos, monkeypatch, settings):
    requests = requests_of(model, photos)[:12]
    model.double()  # in float32, rounding decides between continuations of random weights
    end_early(monkeypatch, model, requests)
    expected = [reference(model, request, settings) for request in requests]
    greedy = [reply.text for reply in alone(model, requests, settings.model_copy(update={"num_beams": 1}))]
    replies = list(Answerer(model).answer_many(requests, settings))
    texts = [reply.text for reply in replies]
    assert texts == expected
    assert texts != greedy
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    assert list(Answerer(model).answer_many(requests, settings, most_tokens=300)) == replies
    assert alone(model, requests, settings) == replies


@pytest.mark.parametrize("model", ["qwen1-short"], indirect=True)
def test_a_dialogue_may_be_too_long_for_beams(model, photos):
    requests = requests_of(model, photos)[:2]
    message = f"{model.language_model.longest_packed} are the most for answers with beams: set generate.num_beams to 1"
    assert [message in str(reply) for reply in Answerer(model).answer_many(requests, THREE)] == [True, True]
    with pytest.raises(UserError, match=message):
        alone(model, requests, THREE)


def test_drawn_answers_have_no_beams(qwen2, photos):
    drawn = Generate(max_new_tokens=8, temperature=1.0)
    requests = requests_of(qwen2, photos)[:3]
    with_beams = drawn.model_copy(update={"num_beams": 3})
    assert alone(qwen2, requests, with_beams) == alone(qwen2, requests, drawn)
    assert list(Answerer(qwen2).answer_many(requests, with_beams)) == alone(qwen2, requests, drawn)


def test_a_stop_string_cuts_the_best_answer(qwen2, photos):
    requests = requests_of(qwen2, photos)
    whole = alone(qwen2, requests, THREE)
    letter = next(reply.text[1] for reply in whole if len(reply.text) > 1)
    cut = alone(qwen2, requests, THREE.model_copy(update={"stop": (letter,)}))
    assert [reply.text for reply in cut] == [reply.text.partition(letter)[0] for reply in whole]
    assert any(reply.finish_reason == "stop" for reply in cut)


def test_a_search_can_be_closed(qwen2, photos, monkeypatch):
    passes = []
    begin = BranchCache.begin_pass
    monkeypatch.setattr(BranchCache, "begin_pass", lambda *given: passes.append(given) or begin(*given))
    monkeypatch.setattr(qwen2.processor.chat, "stop_ids", set())
    answerer = Answerer(qwen2)
    stream = answerer.stream(photos[0], [{"role": "user", "content": "What?"}], THREE)
    assert next(stream._pieces) == "" == next(stream._pieces)
    stream.close()
    assert (stream.reply.text, stream.reply.finish_reason, len(passes)) == ("", "cancelled", 1)
    assert "".join(answerer.stream(photos[0], [{"role": "user", "content": "What?"}], THREE))


def test_a_search_that_is_closed_after_its_text_has_it(qwen2, photos):
    answerer, messages = Answerer(qwen2), [{"role": "user", "content": "What?"}]
    whole = answerer.stream(photos[0], messages, THREE).rest()
    stream = answerer.stream(photos[0], messages, THREE)
    assert next(stream) == whole.text != ""
    stream.close()
    assert (stream.reply.text, stream.reply.tokens_out) == (whole.text, whole.tokens_out)


def test_keys_of_a_prompt_are_there_once_for_all_beams(qwen2, photos, monkeypatch):
    caches, create = [], BranchCache.__init__
    monkeypatch.setattr(BranchCache, "__init__", lambda self, *given: caches.append(self) or create(self, *given))
    [reply] = Answerer(qwen2).answer_many(requests_of(qwen2, photos)[:1], THREE)
    [cache] = caches
    assert cache.slots <= reply.tokens_in + 3 * THREE.max_new_tokens


def test_a_server_is_not_told(photos):
    answerer = RemoteAnswerer("http://127.0.0.1:9/v1", model="gpt", settings=THREE)
    with pytest.raises(UserError, match=r"leave generate\.num_beams out"):
        answerer.stream(photos[0], [{"role": "user", "content": "?"}]).rest()
    settings = Generate(length_penalty=0.0, max_new_tokens=8)
    assert answerer._fields([], settings) == {"model": "gpt", "messages": [], "max_tokens": 8}
