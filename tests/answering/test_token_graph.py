"""Answers whose tokens are read by `TokenGraph` are those of the usual way.

Without a GPU, the pass is not recorded but run each time, over the same memory.
"""

from types import SimpleNamespace

import pytest
import torch

from answering import token_graph
from answering.answer import Answerer
from answering.token_graph import TokenGraph
from config import overridden
from tests.answering.dialogues import GREEN, RED, SETTINGS, alone, requests_of

QUESTION = [{"role": "user", "content": "What is it?"}]


def graphed(model):
    """A new engine that reads tokens by a graph, where that is possible."""
    answerer = Answerer(model)
    if model.language_model.equal_passes:
        answerer._graph = TokenGraph(model)
    return answerer


def texts(replies):
    return [(reply.text, reply.finish_reason, reply.tokens_out) for reply in replies]


@pytest.fixture
def few_slots(monkeypatch):
    """So few that answers outgrow them."""
    monkeypatch.setattr(token_graph, "FIRST_SLOTS", 2)


def test_same_answers_in_any_order(model, photos, few_slots):
    requests, answerer, usual = requests_of(model, photos), graphed(model), Answerer(model)
    usual._graph = None
    for request in requests:
        replies = [engine.stream_messages(*request, SETTINGS).rest() for engine in (answerer, usual)]
        assert texts(replies[:1]) == texts(replies[1:])
        assert replies[0].tokens_reused == replies[1].tokens_reused


def test_same_logits(model, photos):
    """In float32; the attention sums in another order."""
    answerer = graphed(model)
    if answerer._graph is None:
        pytest.skip("the passes of Qwen v1 differ from position to position")
    stream = answerer.stream(photos[0], QUESTION, SETTINGS)
    next(stream._pieces)
    [sequence] = answerer._prefixes.sequences
    states = token_graph.DynamicCache()
    for number, layer in enumerate(sequence.states.layers):
        states.update(layer.keys.clone(), layer.values.clone(), number)
    for token in (5, 7, 11):
        embeddings = model.language_model.get_input_embeddings()(torch.tensor([[token]], device=model.device))
        with torch.no_grad():
            expected, found = model.decode(embeddings, states), answerer._graph.read(sequence, token)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    before = len(sequence.ids)
    answerer._graph.put_back(sequence)
    assert sequence.ids[before:] == [5, 7, 11]
    for layer, other in zip(sequence.states.layers, states.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=0, atol=1e-4)


def test_answers_by_turns(qwen2, photos, few_slots):
    requests, answerer = requests_of(qwen2, photos)[:6], graphed(qwen2)
    waiting = {number: answerer.stream_messages(*request, SETTINGS)._pieces for number, request in enumerate(requests)}
    found = dict.fromkeys(waiting, "")
    while waiting:
        for number, pieces in list(waiting.items()):
            piece = next(pieces, None)
            if piece is None:
                del waiting[number]
            else:
                found[number] += piece
    expected = alone(qwen2, requests)
    assert list(found.values()) == [reply.text for reply in expected]
    again = [answerer.stream_messages(*request, SETTINGS).rest() for request in requests]
    assert texts(again) == texts(expected)


def test_a_stream_that_was_dropped_leaves_the_others_right(qwen2, few_slots):
    answerer = graphed(qwen2)
    dropped, other = (answerer.stream(photo, QUESTION, SETTINGS) for photo in (RED, GREEN))
    pieces = [next(other._pieces)]
    for _ in range(3):
        next(dropped._pieces)
    del dropped
    pieces += list(other._pieces)
    assert "".join(pieces) == Answerer(qwen2).stream(GREEN, QUESTION, SETTINGS).rest().text
    assert not any(sequence.unfinished for sequence in answerer._prefixes.sequences)


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_in_another_answer_loses_nothing(qwen2, monkeypatch, error):
    answerer, run = graphed(qwen2), TokenGraph._run
    other, failing = (answerer.stream(photo, QUESTION, SETTINGS) for photo in (GREEN, RED))
    pieces = [next(other._pieces) for _ in range(4)]  # three tokens of it are in the graph's memory only
    next(failing._pieces)

    def broken(_):
        raise error

    monkeypatch.setattr(TokenGraph, "_run", broken)
    with pytest.raises(type(error)):
        next(failing._pieces)
    monkeypatch.setattr(TokenGraph, "_run", run)
    pieces += list(other._pieces)
    assert "".join(pieces) == Answerer(qwen2).stream(GREEN, QUESTION, SETTINGS).rest().text


def full_after(calls, put_back=TokenGraph.put_back):
    """`put_back` whose memory runs out each time, after some tensors."""

    def run(graph, sequence):
        join, count = torch.cat, iter(range(calls))

        def cat(*given, **named):
            if next(count, None) is None:
                raise MemoryError("full")
            return join(*given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_graph.torch, "cat", cat)
            put_back(graph, sequence)

    return run


def test_what_cannot_be_put_back_stays(qwen2, monkeypatch):
    """Memory runs out when another answer takes the graph: that one fails, this one goes on."""
    answerer = graphed(qwen2)
    other, failing = (answerer.stream(photo, QUESTION, SETTINGS) for photo in (GREEN, RED))
    pieces = [next(other._pieces) for _ in range(4)]
    next(failing._pieces)
    with monkeypatch.context() as patch:
        patch.setattr(TokenGraph, "put_back", full_after(2))
        with pytest.raises(MemoryError):
            next(failing._pieces)
    pieces += list(other._pieces)
    assert "".join(pieces) == Answerer(qwen2).stream(GREEN, QUESTION, SETTINGS).rest().text


def test_an_interrupt_is_not_replaced_by_a_lack_of_memory(qwen2, monkeypatch):
    answerer = graphed(qwen2)
    other, failing = (answerer.stream(photo, QUESTION, SETTINGS) for photo in (GREEN, RED))
    pieces = [next(other._pieces) for _ in range(4)]
    next(failing._pieces)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenGraph, "put_back", full_after(1))
        patch.setattr(TokenGraph, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(failing._pieces)
    assert "".join(pieces + list(other._pieces)) == Answerer(qwen2).stream(GREEN, QUESTION, SETTINGS).rest().text


def test_a_whole_answer_is_kept_without_memory_to_put_it_back(qwen2, monkeypatch):
    answerer, expected = graphed(qwen2), Answerer(qwen2).stream(RED, QUESTION, SETTINGS).rest()
    with monkeypatch.context() as patch:
        patch.setattr(TokenGraph, "put_back", full_after(1))
        assert texts([answerer.stream(RED, QUESTION, SETTINGS).rest()]) == texts([expected])
    again = answerer.stream(RED, QUESTION, SETTINGS).rest()
    assert texts([again]) == texts([expected])
    assert again.tokens_reused == expected.tokens_in - 1


def test_putting_back_twice_is_putting_back_once(qwen2):
    answerer = graphed(qwen2)
    stream = answerer.stream(RED, QUESTION, SETTINGS)
    for _ in range(4):
        next(stream._pieces)
    [sequence], graph = answerer._prefixes.sequences, answerer._graph
    owner, ids, before = graph._owner, graph._ids, list(sequence.ids)
    graph.put_back(sequence)
    sequence.ids[:], graph._owner, graph._ids = before, owner, ids  # interrupted before its end
    graph.put_back(sequence)
    assert len(sequence.ids) == len(before) + 3 == sequence.states.get_seq_length()


def test_nan_of_one_answer_reaches_no_other(qwen2):
    answerer, expected = graphed(qwen2), Answerer(qwen2).stream(RED, QUESTION, SETTINGS).rest()
    answerer.stream(RED, QUESTION, SETTINGS).rest()
    cache = answerer._graph._cache
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, -3:] = torch.nan
        tensor[:, :, expected.tokens_in + 1] = torch.nan
    assert texts([answerer.stream(RED, QUESTION, SETTINGS).rest()]) == texts([expected])


@pytest.mark.parametrize("offset", [0, 300])
def test_scores_are_not_rounded_to_16_bits(offset):
    """Qwen2's keys have biases: all scores of a query share a large part, which rounding must not mix with the rest."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 40, 64, generator=generator).bfloat16() for _ in range(2))
    keys[..., 0] = offset
    query = torch.randn(1, 4, 1, 64, generator=generator).bfloat16()
    query[..., 0] = 8
    states = token_graph.DynamicCache()
    states.update(keys, values, 0)
    cache = token_graph.TokenCache(states, 48)
    cache.keys[0][:, :, :40], cache.values[0][:, :, :40] = keys, values
    cache.position.fill_(39)
    found = cache.attend(0, query, keys[:, :, 39:], values[:, :, 39:], None, None)[0, 0]  # (H, D)
    wide = [tensor.double().repeat_interleave(2, dim=1) for tensor in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *wide)[0, :, 0]
    # 8 bits of the weights and of the output; with scores of 16 bits, 0.3 and more at an offset of 300
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_a_long_answer_goes_on_in_the_usual_way(qwen2, monkeypatch):
    expected = Answerer(qwen2).stream(RED, QUESTION, SETTINGS).rest()
    answerer = graphed(qwen2)
    monkeypatch.setattr(token_graph, "MOST_SLOTS", expected.tokens_in + 4)
    monkeypatch.setattr(token_graph, "FIRST_SLOTS", 2)
    stream, read = answerer.stream(RED, QUESTION, SETTINGS), []
    monkeypatch.setattr(qwen2, "decode", lambda *given, run=qwen2.decode: read.append(given[0].shape[1]) or run(*given))
    assert stream.rest().text == expected.text
    assert read == [expected.tokens_in] + [1] * (expected.tokens_out - 1 - 4)


def test_without_room_for_a_graph(qwen2, monkeypatch, capsys):
    """The answer is made in the usual way; shorter ones still have a graph."""
    answerer, expected = graphed(qwen2), Answerer(qwen2).stream(RED, QUESTION, SETTINGS).rest()
    room, made = token_graph.TokenCache, []
    monkeypatch.setattr(token_graph, "FIRST_SLOTS", expected.tokens_in + 2)

    def small(states, slots):
        if slots > expected.tokens_in + 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(slots)
        return room(states, slots)

    monkeypatch.setattr(token_graph, "TokenCache", small)
    for number in range(1, 3):
        assert texts([answerer.stream(RED, QUESTION, SETTINGS).rest()]) == texts([expected])
        assert len(made) == number
    assert capsys.readouterr().err.count("without a CUDA graph, so more slowly (CUDA out of memory)") == 1


def test_a_pass_that_cannot_be_recorded_is_said_once(qwen2, monkeypatch, capsys):
    answerer = graphed(qwen2)
    monkeypatch.setattr(token_graph, "TokenCache", lambda *_: (_ for _ in ()).throw(RuntimeError("not permitted")))
    for _ in range(2):
        answerer.stream(RED, QUESTION, SETTINGS).rest()
    assert capsys.readouterr().err.count("without a CUDA graph, so more slowly (not permitted)") == 1


def test_which_models_suit(model):
    assert model.language_model.equal_passes == (model.LLM.config.model_type != "qwen")
    assert TokenGraph.suits(model) == (model.device.type == "cuda" and model.language_model.equal_passes)
    assert (Answerer(model)._graph is not None) == TokenGraph.suits(model)


@pytest.mark.parametrize(
    ("value", "suits"), [({}, True), ({"gui.cuda_graph": False}, False), ({"llm.quantization": "int8"}, False)]
)
def test_settings_decide_whether_a_model_on_a_gpu_suits(qwen2, value, suits):
    gpu = torch.device("cuda")
    model = SimpleNamespace(
        device=gpu,
        LLM=SimpleNamespace(parameters=lambda: [SimpleNamespace(device=gpu)]),
        language_model=SimpleNamespace(equal_passes=True),
        config=overridden(qwen2.config, value, "test"),
    )
    assert TokenGraph.suits(model) == suits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_is_recorded(qwen2):
    answerer = Answerer(qwen2)
    reply = answerer.stream(RED, QUESTION, SETTINGS).rest()
    assert answerer._graph._graph is not None
    usual = Answerer(qwen2)
    usual._graph = None
    assert texts([reply]) == texts([usual.stream(RED, QUESTION, SETTINGS).rest()])
