"""What the tests of kept keys and values ask, and how they count them."""

from PIL import Image

from answering.answer import Answerer
from answering.open_answer import OpenAnswer
from answering.request import Request
from config import Generate
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config
from visual.photo import load_image

RED, GREEN = Image.new("RGB", (64, 50), (220, 20, 20)), Image.new("RGB", (50, 64), (20, 220, 20))
SHORT = Generate(max_new_tokens=5)
SETTINGS = Generate(max_new_tokens=10)
EVERYTHING = 2**40  # bytes


def build(backbones, language_model="qwen2-tied", **sections):
    """A model that answers something; `language_model` is a name in `backbones` or another folder."""
    config = tiny_config(backbones, llm={"path": str(backbones / language_model)}, **sections)
    model = MMultiModal.from_config(config).eval()
    fill_trained(model)
    return model


def dialogue(photos, questions, answers):
    """The questions, each but the last with its answer; the photos come with the first."""
    messages = []
    for number, question in enumerate(questions):
        messages.append({"role": "user", "content": question, "images": photos if number == 0 else ()})
        if number < len(questions) - 1:
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


def kept_bytes(answerer):
    """Bytes of all memory that the kept sequences hold, by what torch says of it."""
    storages = {}
    for sequence in answerer._prefixes.sequences:
        for layer in sequence.states.layers:
            for tensor in (layer.keys, layer.values):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def requests_of(model, photos):
    """Several questions on several photos in mixed order, dialogues, texts, two photos in one turn and in two."""
    chat = model.processor.chat
    one, two, three, four = photos

    def dialogue(own, *texts, counts=None):
        counts = counts or [len(own), *[0] * len(texts)]
        return Request(own, [
            chat.answer(text) if number % 2 else chat.typed_question(text, counts[number])
            for number, text in enumerate(texts)
        ])  # fmt: skip

    return [
        dialogue([one], "What is it?"),
        dialogue([two], "What is it?"),
        dialogue([], "Hello"),
        dialogue([one], "Which colour has the thing in the middle of this photo?"),
        dialogue([one], "Which?", "Red.", "Sure?"),
        dialogue([three], "它是什么？"),
        dialogue([one], "What is it?"),  # again
        dialogue([one, two], "Same?"),
        dialogue([load_image(four)], "What?"),
        dialogue([one, two], "This?", "Yes", "And this?", counts=[1, 0, 1]),
        dialogue([], "What did you say, and why, and to whom?"),
        dialogue([two], "?"),
        dialogue([one, two], "Other?"),
        dialogue([], "Hi", "Hello", "And now?"),
        dialogue([one], "Which?", "Red.", "Sure?", "Yes.", "Why?"),
        dialogue([three, three], "Twice?"),
    ]


def alone(model, requests, settings=SETTINGS):
    return [Answerer(model).stream_messages(*request, settings).rest() for request in requests]


def tokens_of(monkeypatch, model, requests):
    """The tokens of each answer; their text may not tell, because random bytes are no characters."""
    answers = []
    create = OpenAnswer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(OpenAnswer, "__init__", lambda self, *given: answers.append(self) or create(self, *given))
        alone(model, requests)
    return [answer.tokens for answer in answers]


def end_early(monkeypatch, model, requests):
    """Make tokens that the answers have end them: some at once, some on the way, at least a third not."""
    said = tokens_of(monkeypatch, model, requests)
    stops = {min((tokens[0] for tokens in said), key=lambda token: sum(token in tokens for tokens in said))}
    for token in [tokens[4] for tokens in said if len(tokens) > 4]:
        if sum(not {*stops, token} & {*tokens} for tokens in said) >= len(said) // 3:
            stops.add(token)
    monkeypatch.setattr(model.processor.chat, "stop_ids", stops)
