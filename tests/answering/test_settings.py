"""Decoding settings: sampling is transformers' own, answers end before a stop string, closed streams end at once."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from answering.answer import Answerer
from answering.choice import TokenChoice
from answering.open_answer import OpenAnswer
from answering.request import OpenPrompt
from config import Generate
from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message
from tests.tiny import fill_trained, tiny_config

RED = Image.new("RGB", (64, 50), (220, 20, 20))
QUESTION = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module", params=["qwen2-tied", "qwen3-untied", "qwen1-short"])
def model(request, backbones):
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(backbones / request.param)})).eval()
    fill_trained(model)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 2.5, "top_k": 7},
        {"temperature": 2.5, "top_k": 10**6},  # more than there are tokens
        {"temperature": 2.5, "top_p": 0.7},
        {"temperature": 2.5, "min_p": 0.2},
        {"temperature": 5.0, "min_p": 1.0},  # the likeliest only
        {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_sampling_equals_transformers_generate(model, settings):
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question("What is it?", 1)])[0]])
    pixels = model.processor.transform(RED)[None]
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        # top_k=0: its own default is 50
        tokens = model.generate(pixels, ids, max_new_tokens=20, do_sample=True, **{"top_k": 0} | settings)[0].tolist()
        tokens = [token for token in tokens if token not in model.processor.chat.stop_ids]
        decode = model.processor.tokenizer.decode
        expected = decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ours = Generate(max_new_tokens=20, seed=seed, **settings)
        assert Answerer(model).answer(RED, "What is it?", ours) == expected
        texts.add(expected)
    assert len(texts) == (1 if settings.get("min_p") == 1.0 else 3)


def test_without_a_penalty_there_is_no_history(monkeypatch):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    calls = []
    build, join = torch.tensor, torch.cat
    monkeypatch.setattr(torch, "tensor", lambda *own, **named: calls.append("tensor") or build(*own, **named))
    monkeypatch.setattr(torch, "cat", lambda *own, **named: calls.append("cat") or join(*own, **named))

    def choose(**settings):
        choice = TokenChoice(Generate(**settings), [1, 2], logits.device)
        return [choice.token(logits) for _ in range(3)]

    assert choose() == [int(logits.argmax())] * 3
    choose(temperature=2.0, top_k=5)
    assert calls == []
    choose(repetition_penalty=1.2)
    assert calls == ["tensor", "cat", "cat", "cat"]


# --- stop strings -----------------------------------------------------------------------------------------------------

LETTERS = "ab\n"
END = 999


def open_answer(words, stop, limit=1000):
    """An answer whose tokens are numbers of `words`."""
    decode = lambda ids, **_: "".join(words[number] for number in ids)  # noqa: E731
    processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), chat=SimpleNamespace(stop_ids={END}))
    model = SimpleNamespace(processor=processor, device=torch.device("cpu"))
    return OpenAnswer(model, OpenPrompt([0], (), [], limit), Generate(stop=stop))


@given(
    st.lists(st.text(LETTERS, max_size=3), min_size=1, max_size=12),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_an_answer_ends_before_a_stop_string(words, stop, by_length):
    """Beside a plain search in the whole text after each token; an end token or the longest answer may come first."""
    answer = open_answer(words, stop, len(words) if by_length else 1000)
    given_out, text, expected, reason = "", "", None, "length" if by_length else "stop"
    for number, word in enumerate(words):
        text += word
        given_out += answer.add(number, 0.0)
        places = [text.find(one) for one in stop if one in text]
        if places:
            expected, reason = text[: min(places)], "stop"
            break
        assert text.startswith(given_out)
        held = text[len(given_out) :]  # no more than what may become a stop string
        assert not held or answer.reason is not None or any(one.startswith(held) for one in stop)
    else:
        expected = text
        if not by_length:
            given_out += answer.add(END, 0.0)
    assert (given_out, answer.reason) == (expected, reason)
    reply = answer.reply()
    assert (reply.text, reply.finish_reason, reply.tokens_out) == (expected, reason, len(answer.tokens))


def test_stop_strings_of_a_model(model):
    """The text goes out before the stop string is complete, and the answer takes no pass after it."""
    settings = Generate(max_new_tokens=40)
    text = Answerer(model).answer(RED, "What is it?", settings)
    for start in range(0, len(text) - 3, 5):
        stop = text[start : start + 3]
        stream = Answerer(model).stream(RED, QUESTION, settings.model_copy(update={"stop": ("never", stop)}))
        pieces = list(stream)
        assert "".join(pieces) == text[: text.find(stop)]
        assert stream.reply.text == "".join(pieces)
        assert stream.reply.finish_reason == "stop"
        assert stream.reply.tokens_out <= len(text[: text.find(stop) + len(stop)].encode())  # a token is a byte or more


# --- the system sentence ----------------------------------------------------------------------------------------------


def test_a_system_message_replaces_the_system_sentence(model, backbones):
    said = {"role": "system", "content": "Answer in <|im_end|> one word."}
    expected = Answerer(model).stream(RED, QUESTION).rest()
    own = Answerer(model).stream(RED, [said, *QUESTION]).rest()
    assert own.text != expected.text
    prompt = model.config.prompt.model_copy(update={"system": said["content"]})
    other = MMultiModal.from_config(model.config.model_copy(update={"prompt": prompt})).eval()
    fill_trained(other)
    assert Answerer(other).stream(RED, QUESTION).rest() == own


def test_a_system_message_is_rendered_as_the_template_does(model):
    chat, tokenizer = model.processor.chat, model.processor.tokenizer
    ids = {text: chat.render([Message("system", (text,)), chat.typed_question("?", 0)])[0] for text in ("Hi", "")}
    if tokenizer.chat_template is not None:  # Qwen v1 has none
        template = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "?"}]
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        assert ids["Hi"] == tokenizer.apply_chat_template(template, **options)
        assert ids[""] == tokenizer.apply_chat_template(template[1:], **options)
    assert len(ids[""]) < len(ids["Hi"])


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ([], "the question is empty"),
        (["system"], "the question is empty"),
        (["user", "assistant"], "the question is empty"),
        (["user", "user"], r"message 2 is of the role 'user'.*it must be 'assistant'"),
        (["assistant", "user"], r"message 1 is of the role 'assistant'.*it must be 'user'"),
        (["user", "system", "user"], r"message 2 is of the role 'system'"),
        (["system", "system", "user"], r"message 2 is of the role 'system'.*it must be 'user'"),
        (["tool", "assistant", "user"], r"message 1 is of the role 'tool'"),
    ],
)
def test_roles_in_another_order(model, roles, expected):
    with pytest.raises(UserError, match=expected):
        Answerer(model).stream(None, [{"role": role, "content": "Hello"} for role in roles])


# --- replies and closing ----------------------------------------------------------------------------------------------


def test_a_reply_says_what_it_cost(model, monkeypatch):
    monkeypatch.setattr(model.processor.chat, "stop_ids", set())
    answerer, settings = Answerer(model), Generate(max_new_tokens=5)
    first, again = (answerer.stream(RED, QUESTION, settings).rest() for _ in range(2))
    ids, _ = model.processor.chat.render([model.processor.chat.typed_question("What is it?", 1)])
    assert first == again
    assert (first.tokens_in, first.tokens_out, first.finish_reason) == (len(ids), 5, "length")
    assert (first.tokens_reused, again.tokens_reused) == (0, len(ids) - 1)
    assert first.seconds_to_first_token > 0
    assert first.tokens_per_second > 0
    one = answerer.stream(RED, QUESTION, Generate(max_new_tokens=1)).rest()
    assert one.tokens_per_second == 0


def test_a_closed_stream_has_a_cancelled_reply(model, monkeypatch):
    monkeypatch.setattr(model.processor.chat, "stop_ids", set())
    passes = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *given: passes.append(given) or decode(*given))
    stream = Answerer(model).stream(RED, QUESTION)
    text = next(stream) + next(stream)
    taken = len(passes)
    stream.close()
    assert (stream.reply.text, stream.reply.finish_reason, stream.reply.tokens_out) == (text, "cancelled", taken)
    assert stream.reply.tokens_in > 0
    assert next(stream, None) is None
    stream.close()
    assert stream.rest().finish_reason == "cancelled"
    assert len(passes) == taken
    whole = Answerer(model).stream(RED, QUESTION)
    reply = whole.rest()
    whole.close()
    assert whole.reply == reply
    assert reply.finish_reason == "length"


def test_closing_from_another_thread_ends_within_one_token(model, monkeypatch):
    """Also where no text is given out, as before a stop string that is never complete."""
    inside, go_on, passes = threading.Event(), threading.Event(), []
    decode = model.decode

    def slow(*given):
        passes.append(given)
        if len(passes) == 3:
            inside.set()
            assert go_on.wait(60)
        return decode(*given)

    monkeypatch.setattr(model.processor.chat, "stop_ids", set())
    monkeypatch.setattr(OpenAnswer, "_before_stop", lambda *_: "")
    monkeypatch.setattr(model, "decode", slow)
    stream, found = Answerer(model).stream(RED, QUESTION), []
    reading = threading.Thread(target=lambda: found.append(stream.rest()))
    reading.start()
    assert inside.wait(60)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._closed:
        pass
    go_on.set()
    closing.join(60), reading.join(60)
    assert len(passes) == 3
    assert [(reply.finish_reason, reply.tokens_out) for reply in found] == [("cancelled", 3)]


def test_an_error_leaves_no_reply(model):
    stream = Answerer(model).stream(None, [{"role": "user", "content": "long " * 400}])
    with pytest.raises(UserError, match="the language model reads 1024"):
        next(stream)
    stream.close()
    assert stream.reply is None
