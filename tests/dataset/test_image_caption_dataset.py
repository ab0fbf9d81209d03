"""Samples, the choice of answers, length limits and batches."""

import pytest
import torch

from config import Prompt
from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo, Turn
from qwen.chat import IGNORE_INDEX, ChatFormat
from qwen.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer

N = 3
TAG = "<|extra_0|>"
PHOTOS = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(3)}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatFormat(load_tokenizer(folder), Prompt(system="S"), N)


def pixels_of(photo):
    return torch.full((3, 4, 4), float(photo.ID))


def make(chat, entries, **settings):
    return ImageCaptionDataset(PHOTOS, entries, chat, pixels_of, **settings)


def one(image, question, *answers):
    return Entry(() if image is None else (image,), "s", "s", (Turn(question, answers),))


def test_answer_choice_depends_on_epoch_and_index_only(chat):
    entries = [one(0, f"{TAG}\nQ", *"abcdefgh") for _ in range(20)]
    dataset, again = make(chat, entries), make(chat, entries)
    first = [dataset[index]["labels"].tolist() for index in range(20)]
    assert first == [again[index]["labels"].tolist() for index in reversed(range(20))][::-1]
    assert len({tuple(row) for row in first}) > 1
    dataset.set_epoch(1)
    assert first != [dataset[index]["labels"].tolist() for index in range(20)]
    assert first != [make(chat, entries, seed=1)[index]["labels"].tolist() for index in range(20)]


def test_two_rows_on_one_photo_keep_their_answers(chat):
    dataset = make(chat, [one(1, f"{TAG}\nA", "first"), one(1, f"{TAG}\nB", "second")])
    answers = [chat.tokenizer.decode([x for x in dataset[i]["labels"] if x != IGNORE_INDEX]) for i in range(2)]
    assert answers == ["first<|im_end|>", "second<|im_end|>"]
    assert all(dataset[i]["pixel_values"].eq(1).all() for i in range(2))


def test_long_dialogues_lose_whole_turns_then_the_end_of_the_answer(chat):
    turns = (Turn(f"{TAG}\nA", ("one",)), Turn("B", ("two",)))
    entry = Entry((0,), "s", "s", turns)
    whole = len(make(chat, [entry])[0]["input_ids"])
    shorter = make(chat, [entry], max_length=whole - 1)[0]
    assert chat.tokenizer.decode(shorter["input_ids"]).endswith("one<|im_end|>\n")
    cut = make(chat, [entry], max_length=len(shorter["input_ids"]) - 3)[0]
    assert chat.tokenizer.decode(cut["input_ids"]).endswith("assistant\non")
    assert (cut["input_ids"] == chat.image_token_id).sum() == N
    hopeless = make(chat, [entry], max_length=16)
    with pytest.raises(ValueError, match=r"'data.max_length' = 16 tokens"):
        hopeless.tokens(0)
    assert "max_length" in hopeless[0]["error"]


def test_batch_is_one_row_with_each_photo_once(chat):
    two = Entry((1, 0), "s", "s", (Turn(f"{TAG}{TAG}\nSame?", ("no",)),))
    dataset = make(chat, [one(0, f"{TAG}\nQ", "a"), one(None, "Hello", "hi"), two])
    samples = [dataset[i] for i in range(3)]
    batch = collate(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["layout"].samples == tuple((length,) for length in lengths)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    assert batch["position_ids"].tolist() == [[position for length in lengths for position in range(length)]]
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([sample[name] for sample in samples]), batch[name][0])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]
    assert batch["photo_index"].tolist() == [0, 1, 0]
    assert {"pixel_values", "photo_index"}.isdisjoint(collate([dataset[1]]))


def test_broken_photo_becomes_a_sentence_not_a_worker_traceback(chat):
    def broken(photo):
        raise ValueError(f"photo {photo.ID} is cut off")

    dataset = ImageCaptionDataset(PHOTOS, [one(1, f"{TAG}\nQ", "a"), one(None, "Q", "a")], chat, broken)
    assert collate([dataset[1], dataset[0]]) == {"error": "photo 1 is cut off"}
