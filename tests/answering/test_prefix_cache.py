"""A kept prefix changes no answer, costs only what is new, and stays within its bytes."""

import functools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DynamicCache

from answering.answer import Answerer
from answering.choice import TokenChoice
from answering.open_answer import OpenAnswer
from answering.prefix_cache import CachedSequence, PrefixCache
from answering.request import OpenPrompt
from config import Generate
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config

RED, GREEN = Image.new("RGB", (64, 50), (220, 20, 20)), Image.new("RGB", (50, 64), (20, 220, 20))
PHOTOS = [(), (RED,), (GREEN,), (RED, GREEN), (GREEN, RED)]
QUESTIONS = ["What?", "What colour?", "它是什么？"]
SHORT = Generate(max_new_tokens=5)
EVERYTHING = 2**40


def build(backbones, name):
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(backbones / name)})).eval()
    fill_trained(model)
    return model


@pytest.fixture(scope="module", params=["qwen2-tied", "qwen3-untied", "qwen1-short"])
def model(request, backbones):
    return build(backbones, request.param)


@pytest.fixture(scope="module")
def qwen2(backbones):
    return build(backbones, "qwen2-tied")


def dialogue(photos, questions, answers):
    """The questions, each but the last with its answer; the photos come with the first."""
    messages = []
    for number, question in enumerate(questions):
        messages.append({"role": "user", "content": question, "images": photos if number == 0 else ()})
        if number < len(questions) - 1:
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


# --- whatever is asked, in any order ----------------------------------------------------------------------------------


class Watched:
    """Notes every answer that is begun, with the logits of its tokens, while it is active."""

    def __init__(self):
        self.answers = []
        self.logits = {}

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        create, choose = OpenAnswer.__init__, TokenChoice.token

        def noting(answer, *given):
            create(answer, *given)
            self.answers.append(answer)
            self.logits[answer.choice] = []

        def choosing(choice, logits):
            self.logits[choice].append(logits.clone())
            return choose(choice, logits)

        self._patch.setattr(OpenAnswer, "__init__", noting)
        self._patch.setattr(TokenChoice, "token", choosing)
        return self

    def __exit__(self, *_):
        self._patch.undo()


@functools.cache
def expected(model, photos, questions, edited):
    """Tokens, logits and text of a new engine's answer; earlier answers are its own, or edited."""
    answers = []
    for number in range(1, len(questions)):
        own = "No." if edited else expected(model, photos, questions[:number], edited)[2]
        answers.append(own)
    messages = dialogue([(RED, GREEN)[number] for number in photos], questions, answers)
    with Watched() as watched:
        reply = Answerer(model).stream(None, messages, SHORT).rest()
    [answer] = watched.answers
    return answer.tokens, watched.logits[answer.choice], reply.text, messages


def whole(prompt):
    """The ids of a prompt with the photos themselves in place of their placeholders."""
    ids = [*prompt.ids]
    for photo, (start, end) in zip(prompt.photos, prompt.spans, strict=True):
        ids[start:end] = [photo] * (end - start)
    return ids


def same_start(first, second):
    same = [one == other for one, other in zip(first, second, strict=False)]
    return (*same, False).index(False)


def kept_bytes(answerer):
    """Bytes of all memory that the kept sequences hold, by what torch says of it."""
    storages = {}
    for sequence in answerer._prefixes.sequences:
        for layer in sequence.states.layers:
            for tensor in (layer.keys, layer.values):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


asked = st.tuples(
    st.sampled_from([(), (0,), (1,), (0, 1), (1, 0)]),  # photos
    st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=3).map(tuple),
    st.booleans(),  # whether earlier answers are edited
    st.sampled_from([None, None, None, 0, 1, 3]),  # cancelled after this many tokens
)
EDITS = [((0,), ("What?", "What colour?", QUESTIONS[number]), False, None) for number in (0, 1, 0)]


@settings(max_examples=25)
@given(st.lists(asked, min_size=2, max_size=7), st.sampled_from([0, 30_000, 80_000, EVERYTHING]), st.integers(0, 9))
@example(EDITS, EVERYTHING, 0)
@example(EDITS, 30_000, 0)
def test_any_interleaving_gives_the_answers_of_new_engines(model, asks, most_bytes, seed):
    """Float32; reading a prompt in parts sums in another order, which moved the logits (up to 20) by at most 2e-5."""
    answerer, draw = Answerer(model, most_bytes), random.Random(seed)
    waiting, running, prompts = [*asks], [], []

    def start(photos, questions, edited, cancelled):
        tokens, logits, _, messages = expected(model, photos, questions, edited)
        with Watched() as watched:
            stream = answerer.stream(None, messages, SHORT)
            items = stream._pieces  # an item for each token; pieces of text skip empty ones
            next(items)
            [answer] = watched.answers
        running.append((stream, answer, tokens, cancelled))
        check_prompt(answer.prompt, answer.tokens_reused)
        for one, other in zip(watched.logits[answer.choice], logits, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)

    def check_prompt(prompt, reused):
        key = model.language_model.prefix_key(len(prompt.ids))
        same = [same_start(whole(one), whole(prompt)[:-1]) for one, own in prompts if own == key]
        if most_bytes == EVERYTHING:
            assert reused >= max(same, default=0)
        prompts.append((prompt, key))

    def go_on(entry):
        stream, answer, tokens, cancelled = entry
        if cancelled is not None and len(answer.tokens) >= cancelled:
            stream.close()
        elif next(stream._pieces, None) is not None:
            return
        running.remove(entry)
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert answer.reason is None or answer.tokens == tokens

    while waiting or running:
        if waiting and (not running or draw.random() < 0.4):
            start(*waiting.pop(0))
        else:
            go_on(draw.choice(running))
        if not running:
            assert kept_bytes(answerer) <= most_bytes
            assert kept_bytes(answerer) == sum(sequence.size for sequence in answerer._prefixes.sequences)


# --- what is new is all that is read ----------------------------------------------------------------------------------


@pytest.fixture
def chats(qwen2, monkeypatch):
    """One answerer, and a function that asks it: returns the tokens of the prompt, and how many of them were read."""
    monkeypatch.setattr(qwen2.processor.chat, "stop_ids", set())
    answerer, read = Answerer(qwen2), []
    decode = qwen2.decode
    monkeypatch.setattr(qwen2, "decode", lambda rows, cache: read.append(rows.shape[1]) or decode(rows, cache))

    def ask(photos, *texts):
        read.clear()
        reply = answerer.stream(None, dialogue(photos, texts[::2], texts[1::2]), SHORT).rest()
        assert read == [reply.tokens_in - reply.tokens_reused, *[1] * (SHORT.max_new_tokens - 1)]
        return reply.tokens_in, read[0]

    return answerer, ask


def test_going_back_to_an_earlier_chat_reads_its_new_question(chats):
    _, ask = chats
    first, other = ask([RED], "What?"), ask([GREEN], "What?")
    ask([], "Hello")
    for photos, before in (([RED], first[0]), ([GREEN], other[0])):
        length, read = ask(photos, "What?", "A thing.", "Which colour has it?")
        assert read <= length - before
    for photos in ([GREEN], [RED]):
        assert ask(photos, "What?", "A thing.", "Which colour has it?")[1] == 1


def test_an_edited_third_question_reads_what_changed_and_the_old_one_stays(chats):
    _, ask = chats
    before = ("What?", "A thing.", "Where?", "There.")
    long = "Which colour has the thing in the middle of the photo"
    ask([RED], *before[:1]), ask([RED], *before[:3])
    ask([RED], *before, f"{long}?")
    # the last letter, and <|im_end|>\n<|im_start|>assistant\n behind it: the tokenizer has a token for each byte
    assert ask([RED], *before, f"{long}!")[1] == 1 + 3 + len("assistant\n")
    for text in (f"{long}?", f"{long}!"):
        assert ask([RED], *before, text)[1] == 1
    assert ask([RED], "What?")[1] == 1


def test_the_same_question_again_takes_no_more_memory(chats):
    answerer, ask = chats
    ask([RED], "What?")
    kept = kept_bytes(answerer)
    for _ in range(3):
        assert ask([RED], "What?")[1] == 1
    assert kept_bytes(answerer) == kept


def test_a_stream_that_was_dropped_gives_its_sequence_away(chats):
    answerer, ask = chats
    stream = answerer.stream(RED, [{"role": "user", "content": "What?"}], SHORT)
    next(stream)
    assert ask([RED], "What?")[1] == 1  # beside the unfinished one
    assert len(answerer._prefixes.sequences) == 2
    del stream
    ask([RED], "What?"), ask([RED], "What?")
    assert len(answerer._prefixes.sequences) == 2
    assert not any(sequence.unfinished for sequence in answerer._prefixes.sequences)


def test_only_the_encoder_runs_again_for_a_changed_system_sentence(chats, qwen2, monkeypatch):
    answerer, ask = chats
    ask([RED], "What?")
    monkeypatch.setattr(qwen2, "encode_image", lambda _: pytest.fail("the photo was encoded again"))
    messages = [{"role": "system", "content": "Be brief."}, *dialogue([RED], ["What?"], [])]
    reply = answerer.stream(None, messages, SHORT).rest()
    assert reply.tokens_reused < reply.tokens_in - qwen2.processor.chat.plan.crop_tokens


# --- the cache by itself ----------------------------------------------------------------------------------------------


def prompt(text, photos=(), spans=()):
    return OpenPrompt([ord(letter) for letter in text], tuple(photos), list(spans), 10)


def read(cache, asked, answer="", key=None):
    """Read a prompt and its answer as the engine does; return the number of tokens that were there."""
    sequence = cache.begin(asked, key)
    shared = len(sequence.ids)
    new = asked.ids[shared:] + [ord(letter) for letter in answer]
    states = torch.tensor(new, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 3)  # 2 heads of width 3
    for layer in range(2):
        sequence.states.update(states, states + layer, layer)
    sequence.ids += new
    sequence.unfinished = False
    cache.keep(sequence)
    for layer in sequence.states.layers:
        assert layer.keys[0, 0, :, 0].tolist() == sequence.ids
    return shared


TOKEN = 2 * 2 * 2 * 3 * 4  # keys and values of 2 layers, 2 heads of width 3, float32


def texts(cache):
    return ["".join(map(chr, sequence.ids)) for sequence in cache.sequences]


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(12 * TOKEN)
    assert read(cache, prompt("aaaa")) == read(cache, prompt("bbbb")) == read(cache, prompt("cccc")) == 0
    assert read(cache, prompt("aaaa")) == 3
    assert texts(cache) == ["bbbb", "cccc", "aaaa"]
    read(cache, prompt("dddd"))
    assert texts(cache) == ["cccc", "aaaa", "dddd"]
    assert read(cache, prompt("ccxx")) == 2  # a use of the first, which stays beside it
    assert texts(cache) == ["dddd", "cccc", "ccxx"]


@pytest.mark.parametrize(("most", "kept"), [(4 * TOKEN, ["aaaa"]), (4 * TOKEN - 1, []), (0, [])])
def test_bytes_are_counted_exactly(most, kept):
    cache = PrefixCache(most)
    read(cache, prompt("aaaa"))
    assert texts(cache) == kept
    assert [sequence.size for sequence in cache.sequences] == [4 * TOKEN] * len(kept)


def test_a_sequence_without_room_costs_no_other_its_place():
    cache = PrefixCache(8 * TOKEN)
    read(cache, prompt("aaaa")), read(cache, prompt("bbbb")), read(cache, prompt("c" * 9))
    assert texts(cache) == ["aaaa", "bbbb"]


def test_prompts_live_on_and_answers_give_way():
    cache = PrefixCache(EVERYTHING)
    read(cache, prompt("question "), "answer")
    assert read(cache, prompt("question "), "another") == len("question ") - 1
    assert texts(cache) == ["question another"]
    assert read(cache, prompt("question another why: "), "!") == len("question another")
    assert texts(cache) == ["question another why: !"]
    assert read(cache, prompt("question another who: "), "?") == len("question another wh")
    assert sorted(texts(cache)) == ["question another who: ?", "question another why: !"]
    assert read(cache, prompt("quest ")) == len("quest")
    assert len(texts(cache)) == 3


def test_an_unfinished_sequence_is_shared_but_not_taken():
    cache = PrefixCache(EVERYTHING)
    sequence = cache.begin(prompt("aaaa"), None)
    states = torch.zeros(1, 2, 4, 3)
    sequence.states.update(states, states, 0)
    sequence.ids += prompt("aaaa").ids
    cache.keep(sequence)
    other = cache.begin(prompt("aaaa"), None)
    assert other.ids == prompt("aaa").ids
    assert cache.sequences == [sequence]
    assert sequence.states.get_seq_length() == 4
    sequence.unfinished = False
    cache.begin(prompt("aaaa"), None)
    assert cache.sequences == []


def test_equal_placeholders_of_other_photos_and_other_keys_are_not_shared():
    cache = PrefixCache(EVERYTHING)
    one, two = prompt("ab###c", ["red"], [(2, 5)]), prompt("ab###c", ["green"], [(2, 5)])
    read(cache, one)
    assert read(cache, two) == 2
    assert read(cache, one) == read(cache, two) == 5
    assert read(cache, prompt("ab###d", ["red"], [(2, 5)])) == 5
    assert read(cache, prompt("ab###d###e", ["red", "red"], [(2, 5), (6, 9)])) == 6
    assert read(cache, prompt("ab###d###e", ["red", "green"], [(2, 5), (6, 9)])) == 6
    assert read(cache, one, key=3.0) == 0


def test_a_new_sequence_is_empty():
    sequence = CachedSequence(None, (), 3)
    assert (sequence.ids, sequence.states.get_seq_length()) == ([], 0)
    assert isinstance(sequence.states, DynamicCache)
