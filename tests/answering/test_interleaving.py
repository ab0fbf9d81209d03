"""Whatever is asked in any order, a shared engine answers as new engines do, within its bytes."""

import functools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from answering.answer import Answerer
from answering.choice import TokenChoice
from answering.open_answer import OpenAnswer
from answering.token_graph import TokenGraph
from tests.answering.dialogues import EVERYTHING, GREEN, RED, SHORT, build, dialogue, kept_bytes

QUESTIONS = ["What?", "What colour?", "它是什么？"]


@pytest.fixture(scope="module", params=["qwen2-tied", "qwen3-untied", "qwen1-short"])
def model(request, backbones):
    return build(backbones, request.param)


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


asked = st.tuples(
    st.sampled_from([(), (0,), (1,), (0, 1), (1, 0)]),  # photos
    st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=3).map(tuple),
    st.booleans(),  # whether earlier answers are edited
    st.sampled_from([None, None, None, 0, 1, 3]),  # cancelled after this many tokens
)
EDITS = [((0,), ("What?", "What colour?", QUESTIONS[number]), False, None) for number in (0, 1, 0)]
PHOTOS = [(photos, ("What?",), False, 1) for photos in ((0,), (1,), (0, 1), (1, 0), ())]


class Asking:
    """Answers of one engine that are made by turns, each compared with that of a new engine."""

    def __init__(self, model, most_bytes, graph):
        self.model, self.answerer = model, Answerer(model)
        if graph and model.language_model.equal_passes:
            self.answerer._graph = TokenGraph(model)
        self.answerer._prefixes.most_bytes = most_bytes
        self.running, self.prompts = [], []

    def start(self, photos, questions, edited, cancelled):
        """Begin an answer, whose first token takes the one pass that reads a prompt."""
        tokens, logits, _, messages = expected(self.model, photos, questions, edited)
        with Watched() as watched:
            stream = self.answerer.stream(None, messages, SHORT)
            next(stream._pieces)  # has an item for each token, also for one without text
            [answer] = watched.answers
        self.running.append((stream, answer, tokens, cancelled))
        [first] = watched.logits[answer.choice]
        torch.testing.assert_close(first, logits[0], rtol=0, atol=1e-4)
        self.check_reuse(answer)

    def check_reuse(self, answer):
        """All that an earlier prompt began with is reused, if nothing was dropped."""
        prompt = answer.prompt
        key = self.model.language_model.prefix_key(len(prompt.ids))
        same = [same_start(whole(one), whole(prompt)[:-1]) for one, own in self.prompts if own == key]
        if self.answerer._prefixes.most_bytes == EVERYTHING:
            assert answer.tokens_reused >= max(same, default=0)
        self.prompts.append((prompt, key))

    def go_on(self, entry):
        stream, answer, tokens, cancelled = entry
        if cancelled is not None and len(answer.tokens) >= cancelled:
            stream.close()
        elif next(stream._pieces, None) is not None:
            return
        self.running.remove(entry)
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert answer.reason is None or answer.tokens == tokens


@pytest.mark.parametrize("graph", [False, True])
@settings(max_examples=25)
@given(st.lists(asked, min_size=2, max_size=7), st.sampled_from([0, 30_000, 80_000, EVERYTHING]), st.integers(0, 9))
@example(EDITS, EVERYTHING, 0)
@example(EDITS, 30_000, 0)
@example(PHOTOS, EVERYTHING, 0)
def test_any_interleaving_gives_the_answers_of_new_engines(model, graph, asks, most_bytes, seed):
    """In float32. Reading a prompt in parts sums in another order, which moves the logits by less than 1e-4."""
    asking, waiting, draw = Asking(model, most_bytes, graph), [*asks], random.Random(seed)
    while waiting or asking.running:
        if waiting and (not asking.running or draw.random() < 0.4):
            asking.start(*waiting.pop(0))
        else:
            asking.go_on(draw.choice(asking.running))
        if not asking.running:
            kept = kept_bytes(asking.answerer)
            assert kept <= most_bytes
            assert kept == sum(sequence.size for sequence in asking.answerer._prefixes.sequences)
