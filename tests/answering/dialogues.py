"""What the tests of kept keys and values ask, and how they count them."""

from PIL import Image

from config import Generate
from model.model import MMultiModal
from tests.tiny import fill_trained, tiny_config

RED, GREEN = Image.new("RGB", (64, 50), (220, 20, 20)), Image.new("RGB", (50, 64), (20, 220, 20))
SHORT = Generate(max_new_tokens=5)
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
