"""Answers of a batch are those of asking one by one, whatever is in the batch, and from several threads."""

import threading
import weakref

import pytest
import torch
from accelerate import dispatch_model

import compat
from answering import batches
from answering.answer import Answerer
from answering.batches import BATCH_TOKENS
from answering.request import Request
from errors import UserError
from qwen.branches import BranchCache
from tests.answering.dialogues import SETTINGS, alone, build, end_early, requests_of, tokens_of


@pytest.mark.parametrize("most_tokens", [1, 300, BATCH_TOKENS])
def test_answers_are_those_of_asking_one_by_one(model, photos, monkeypatch, most_tokens):
    requests = requests_of(model, photos)
    end_early(monkeypatch, model, requests)
    expected = alone(model, requests)
    assert {reply.finish_reason for reply in expected} == {"stop", "length"}
    assert {0, SETTINGS.max_new_tokens} < {reply.tokens_out for reply in expected}
    assert len({reply.text for reply in expected}) > 5
    assert list(Answerer(model).answer_many(requests, SETTINGS, most_tokens)) == expected


def test_questions_of_a_photo_are_cut_into_groups(qwen2, photos, monkeypatch):
    monkeypatch.setattr(batches, "MOST_BRANCHES", 2)
    requests = requests_of(qwen2, photos)
    assert list(Answerer(qwen2).answer_many(requests, SETTINGS)) == alone(qwen2, requests)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 20, "min_p": 0.02},
        {"repetition_penalty": 1.4},
        {"stop": ("e", "a ", *"nopq")},
    ],
)
def test_settings_do_not_depend_on_the_batch(qwen2, photos, changes):
    settings = SETTINGS.model_copy(update=changes)
    requests = requests_of(qwen2, photos)
    expected = alone(qwen2, requests, settings)
    assert expected != alone(qwen2, requests)
    assert list(Answerer(qwen2).answer_many(requests, settings)) == expected
    assert list(Answerer(qwen2).answer_many(requests[::-2], settings)) == expected[::-2]


@pytest.fixture
def watched(qwen2, monkeypatch):
    """The crops of each call of the encoder, the tokens of each pass, and the caches of all batches."""
    crops, tokens, caches = [], [], []
    encode, states, create = qwen2.encode_image, qwen2.language_model.packed_states, BranchCache.__init__

    def noting(self, *given):
        create(self, *given)
        caches.append(self)

    monkeypatch.setattr(qwen2, "encode_image", lambda pixels: crops.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(
        qwen2.language_model, "packed_states", lambda *a, **k: tokens.append(a[0].shape[1]) or states(*a, **k)
    )
    monkeypatch.setattr(BranchCache, "__init__", noting)
    return crops, tokens, caches


def test_a_photo_is_read_once_for_all_its_questions(qwen2, photos, watched, monkeypatch):
    crops, tokens, caches = watched
    monkeypatch.setattr(qwen2.processor.chat, "stop_ids", set())
    chat = qwen2.processor.chat
    requests = [
        Request([photo], [chat.typed_question(f"Question {number}?", 1)]) for number in range(5) for photo in photos[:2]
    ]
    replies = list(Answerer(qwen2).answer_many(requests, SETTINGS))
    assert crops == [2]
    [cache] = caches
    assert [len(lengths) for lengths in cache.lengths] == [1 + 5, 1 + 5]
    longest = max(reply.tokens_in for reply in replies)
    assert all(lengths[0] > chat.plan.crop_tokens for lengths in cache.lengths)
    assert all(sum(lengths) < longest + 4 * 30 for lengths in cache.lengths)  # a question has fewer than 30 tokens
    # one pass for the prompts and one after each token but the last
    assert tokens[1:] == [len(requests)] * (SETTINGS.max_new_tokens - 1)


def test_the_batch_is_bounded_in_bytes(qwen2, monkeypatch):
    assert batches.batch_tokens(qwen2) == BATCH_TOKENS
    answerer = Answerer(qwen2)
    answerer.answer(None, "Hello")
    layers = answerer._prefixes.sequences[0].states.layers
    a_token = 2 * len(layers) * layers[0].keys[0, :, 0].nbytes  # measured: keys and values of all layers
    monkeypatch.setattr(batches, "BATCH_BYTES", 1000 * a_token + 1)
    assert batches.batch_tokens(qwen2) == 1000


@pytest.mark.parametrize("most_tokens", [150, 400])
def test_memory_is_bounded(qwen2, photos, watched, monkeypatch, most_tokens):
    monkeypatch.setattr(qwen2.processor.chat, "stop_ids", set())
    requests = requests_of(qwen2, photos) * 2
    list(Answerer(qwen2).answer_many(requests, SETTINGS, most_tokens))
    _, tokens, caches = watched
    assert len(caches) > 2
    for cache in caches:
        single = [len(lengths) for lengths in cache.lengths] == [2]  # the first question has room in any case
        assert cache.slots <= most_tokens or single
    assert max(tokens) <= max(most_tokens, max(reply.tokens_in for reply in alone(qwen2, requests)))


def test_requests_are_taken_as_they_are_needed(qwen2, photos):
    taken = []
    requests = requests_of(qwen2, photos)
    replies = Answerer(qwen2).answer_many((taken.append(request) or request for request in requests), SETTINGS, 300)
    first = next(replies)
    assert first == alone(qwen2, requests[:1])[0]
    assert 1 < len(taken) < len(requests)


def test_an_error_stands_in_its_place(model, photos, tmp_path):
    requests = requests_of(model, photos)
    expected = alone(model, requests)
    chat = model.processor.chat
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    requests.insert(2, Request([tmp_path / "broken.jpg"], [chat.typed_question("What?", 1)]))
    requests.insert(7, Request([], [chat.typed_question("long " * 400, 0)]))
    replies = list(Answerer(model).answer_many(requests, SETTINGS))
    errors = [replies.pop(7), replies.pop(2)]
    assert replies == expected
    assert all(isinstance(error, UserError) for error in errors)
    assert "the language model reads 1024" in str(errors[0])
    assert "broken.jpg" in str(errors[1])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_that_memory_has_no_room_for_is_answered_in_parts(qwen2, photos, monkeypatch, beams):
    settings = SETTINGS.model_copy(update={"num_beams": beams})
    requests = requests_of(qwen2, photos)
    expected = list(Answerer(qwen2).answer_many(requests, settings))
    slots, failed, create = [], [], BranchCache.__init__

    def with_little_memory(self, *given):
        assert all(cache() is None for cache in failed)  # their memory is free again
        create(self, *given)
        slots.append(self.slots)
        if self.slots > 700:
            failed.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BranchCache, "__init__", with_little_memory)
    answerer = Answerer(qwen2)
    assert list(answerer.answer_many(requests, settings)) == expected
    assert failed
    assert max(slots[-2:]) <= 700
    before = len(failed)
    assert list(answerer.answer_many(requests, settings)) == expected
    assert len(failed) == before  # the batches stay smaller


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failed_batch_leaves_a_usable_answerer(qwen2, photos, monkeypatch, error):
    answerer, requests = Answerer(qwen2), requests_of(qwen2, photos)
    expected = list(answerer.answer_many(requests, SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(BranchCache, "begin_pass", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            list(answerer.answer_many(requests, SETTINGS))
    assert answerer._lock.acquire(timeout=0)
    answerer._lock.release()
    assert list(answerer.answer_many(requests, SETTINGS)) == expected


def test_threads_of_streams_and_batches_get_the_answers_they_get_alone(model, photos):
    requests = requests_of(model, photos)
    expected = alone(model, requests)
    shared, found, problems = Answerer(model), {}, []
    start = threading.Barrier(5)

    def run(name, work):
        start.wait()
        try:
            found[name] = work()
        except BaseException as problem:
            problems.append(problem)

    def streams():
        return [shared.stream_messages(*request, SETTINGS).rest() for request in requests]

    def abandoned():
        for request in requests:
            stream = shared.stream_messages(*request, SETTINGS)
            next(stream, None)
            if request.photos:
                stream.close()
            else:
                del stream

    works = {
        "streams": streams,
        "backwards": lambda: [shared.stream_messages(*request, SETTINGS).rest() for request in requests[::-1]][::-1],
        "batch": lambda: list(shared.answer_many(requests, SETTINGS)),
        "batches": lambda: list(shared.answer_many(requests, SETTINGS, 300)),
        "abandoned": abandoned,
    }
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in works.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert problems == []
    assert not any(thread.is_alive() for thread in threads)
    assert {name: replies for name, replies in found.items() if replies is not None} == dict.fromkeys(
        ["streams", "backwards", "batch", "batches"], expected
    )


@pytest.mark.parametrize("leave", ["open", "close", "forget"])
def test_a_stream_that_nobody_finishes_blocks_nobody(qwen2, photos, leave):
    answerer, requests = Answerer(qwen2), requests_of(qwen2, photos)
    expected = alone(qwen2, requests)
    stream = answerer.stream_messages(*requests[0], SETTINGS)
    next(stream)
    if leave == "close":
        stream.close()
    elif leave == "forget":
        del stream
    found = []
    thread = threading.Thread(target=lambda: found.extend(answerer.answer_many(requests, SETTINGS)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert found == expected


def test_replies_of_a_batch_say_how_fast_they_came(qwen2, photos):
    for reply in Answerer(qwen2).answer_many(requests_of(qwen2, photos)[:3], SETTINGS):
        assert reply.seconds_to_first_token > 0
        assert (reply.tokens_per_second > 0) == (reply.tokens_out > 1)
        assert reply.tokens_reused == 0


def test_the_stream_says_how_it_ended(qwen2, photos, monkeypatch):
    stream = Answerer(qwen2).stream(photos[0], [{"role": "user", "content": "What?"}], SETTINGS)
    assert stream.reply is None
    text = "".join(stream)
    reply = stream.reply
    assert (reply.text, reply.finish_reason, reply.tokens_out) == (text, "length", SETTINGS.max_new_tokens)
    prompt, _ = qwen2.processor.chat.render([qwen2.processor.chat.typed_question("What?", 1)])
    assert reply.tokens_in == len(prompt)
    assert next(stream, "end") == "end"
    assert stream.reply == reply
    request = Request(photos[:1], [qwen2.processor.chat.typed_question("What?", 1)])
    monkeypatch.setattr(qwen2.processor.chat, "stop_ids", set(tokens_of(monkeypatch, qwen2, [request])[0][:1]))
    empty = Answerer(qwen2).stream(photos[0], [{"role": "user", "content": "What?"}], SETTINGS).rest()
    assert (empty.text, empty.finish_reason, empty.tokens_out) == ("", "stop", 0)
    closed = Answerer(qwen2).stream(photos[0], [{"role": "user", "content": "What?"}], SETTINGS)
    closed.close()
    assert (closed.reply.text, closed.reply.finish_reason) == ("", "cancelled")


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        SETTINGS.max_new_tokens = 5


def test_a_model_spread_over_devices(backbones, qwen2, photos, tmp_path):
    """accelerate's hooks move what a layer is called with, so the layer itself must be called, not its parts."""
    model = build(backbones)
    requests = requests_of(model, photos)
    expected = [reply.text for reply in Answerer(model).answer_many(requests, SETTINGS)]
    layers = {f"model.layers.{number}": "cpu" for number in range(model.LLM.config.num_hidden_layers)}
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(model.language_model, {**others, **layers, "model.layers.1": "disk"}, "cpu", offload_dir=tmp_path)
    assert all(compat.has_device_hook(layer) for layer in model.language_model.model.layers)
    assert not compat.has_device_hook(qwen2.language_model.model.layers[0])
    called = []
    for number, layer in enumerate(model.language_model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    assert [reply.text for reply in Answerer(model).answer_many(requests, SETTINGS)] == expected
    assert set(called) == set(range(len(model.language_model.model.layers)))
    model = build(backbones).language_model
    states = torch.zeros(2, model.config.hidden_size)
    model.model.embed_tokens = torch.nn.Embedding(4, model.config.hidden_size, device="meta")
    assert model.head(states).device.type == "meta"  # where the tokens go on from
