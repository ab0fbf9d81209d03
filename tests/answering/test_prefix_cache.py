"""A prompt costs only what is new in it; what is kept is bounded, and the least recently used goes first."""

import pytest
import torch

from answering.answer import Answerer
from answering.prefix_cache import PrefixCache
from answering.request import OpenPrompt
from tests.answering.dialogues import EVERYTHING, GREEN, RED, SHORT, dialogue, kept_bytes

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


@pytest.mark.parametrize("megabytes", [0, 1])
def test_the_config_bounds_what_is_kept(qwen2, monkeypatch, megabytes):
    monkeypatch.setattr(qwen2.config.gui, "cache_mb", megabytes)
    answerer = Answerer(qwen2)
    again = [answerer.stream(None, dialogue([RED], ["What?"], []), SHORT).rest().tokens_reused for _ in range(2)][1]
    assert (again > 0) == (kept_bytes(answerer) > 0) == (megabytes > 0)
    assert answerer._prefixes.most_bytes == megabytes * 2**20


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
    ask([RED], "What?")
    assert len(answerer._prefixes.sequences) == 1
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


def test_a_question_before_a_dialogue_has_no_copies():
    """The dialogue shares as much of the question as the question asked again does, and is looked at first."""
    cache = PrefixCache(EVERYTHING)
    read(cache, prompt("question answer next "), "!")
    for _ in range(3):
        assert read(cache, prompt("question "), "answer") == len("question ") - 1
    assert texts(cache) == ["question answer next !", "question answer"]


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
