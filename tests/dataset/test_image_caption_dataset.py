"""Samples, the choice of answers, length limits and batches."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from config import Prompt
from dataset.compact import CompactList
from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo, Turn
from errors import UserError
from qwen.chat import IGNORE_INDEX, ChatFormat
from qwen.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer
from visual_plan import VisualPlan

N = 3
TAG = "<|extra_0|>"
PHOTOS = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(3)}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatFormat(load_tokenizer(folder), Prompt(system="S"), N)


def pixels_of(photo, epoch):
    return torch.full((1, 3, 4, 4), float(photo.ID))


def make(chat, entries, **settings):
    return ImageCaptionDataset(PHOTOS, entries, chat, pixels_of, **settings)


def one(image, question, *answers):
    return Entry("s", "s", (Turn(question, answers, images=() if image is None else (image,)),))


def test_answer_choice_depends_on_epoch_and_index_only(chat):
    entries = [one(0, f"{TAG}\nQ", *"abcdefgh") for _ in range(20)]
    dataset, again = make(chat, entries), make(chat, entries)
    first = [dataset[index].labels.tolist() for index in range(20)]
    assert first == [again[index].labels.tolist() for index in reversed(range(20))][::-1]
    assert len({tuple(row) for row in first}) > 1
    dataset.set_epoch(1)
    assert first != [dataset[index].labels.tolist() for index in range(20)]
    assert first != [make(chat, entries, seed=1)[index].labels.tolist() for index in range(20)]


def test_two_rows_on_one_photo_keep_their_answers(chat):
    dataset = make(chat, [one(1, f"{TAG}\nA", "first"), one(1, f"{TAG}\nB", "second")])
    answers = [chat.tokenizer.decode([x for x in dataset[i].labels if x != IGNORE_INDEX]) for i in range(2)]
    assert answers == ["first<|im_end|>", "second<|im_end|>"]
    assert all(dataset[i].photos[1].eq(1).all() for i in range(2))


def test_long_dialogues_lose_whole_turns_then_the_end_of_the_answer(chat):
    turns = (Turn(f"{TAG}\nA", ("one",), images=(0,)), Turn("B", ("two",)))
    entry = Entry("s", "s", turns)
    whole = len(make(chat, [entry])[0].input_ids)
    shorter = make(chat, [entry], max_length=whole - 1)[0]
    assert chat.tokenizer.decode(shorter.input_ids).endswith("one<|im_end|>\n")
    cut = make(chat, [entry], max_length=len(shorter.input_ids) - 3)[0]
    assert chat.tokenizer.decode(cut.input_ids).endswith("assistant\non")
    assert (cut.input_ids == chat.image_token_id).sum() == N
    hopeless = make(chat, [entry], max_length=16)
    with pytest.raises(ValueError, match=r"'data.max_length' = 16 tokens"):
        hopeless.tokens(0)
    assert "max_length" in hopeless[0]


def test_batch_is_one_row_with_each_photo_once(chat):
    two = Entry("s", "s", (Turn(f"{TAG}{TAG}\nSame?", ("no",), images=(1, 0)),))
    dataset = make(chat, [one(0, f"{TAG}\nQ", "a"), one(None, "Hello", "hi"), two])
    samples = [dataset[i] for i in range(3)]
    batch = collate(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert batch.lengths == tuple((length,) for length in lengths)
    assert batch.input_ids.shape == batch.labels.shape == (1, sum(lengths))
    assert batch.position_ids.tolist() == [[position for length in lengths for position in range(length)]]
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([getattr(sample, name) for sample in samples]), getattr(batch, name)[0])
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 1]
    assert batch.crop_index.tolist() == [0, 1, 0]
    assert collate([dataset[1]]).pixel_values is collate([dataset[1]]).crop_index is None


def broken_except(*whole):
    def load(photo, epoch):
        if photo.ID not in whole:
            raise UserError(f"photo {photo.ID} is cut off")
        return pixels_of(photo, epoch)

    return load


def test_broken_photo_becomes_a_sentence_not_a_worker_traceback(chat):
    dataset = ImageCaptionDataset(PHOTOS, [one(1, f"{TAG}\nQ", "a"), one(None, "Q", "a")], chat, broken_except())
    assert collate([dataset[1], dataset[0]]) == "photo 1 is cut off"


def test_a_broken_photo_is_replaced_by_the_same_other_sample_of_its_source(chat):
    def entry(ID, source="s"):
        return Entry(source, source, (Turn(f"{TAG}\n{ID}?", (f"{ID}",), images=(ID,)),))

    photos = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(12)}
    entries = [entry(ID) for ID in range(11)] + [entry(11, "other")]
    load = broken_except(*range(1, 12))
    dataset = ImageCaptionDataset(photos, entries, chat, load, replace_broken=True)
    again = ImageCaptionDataset(photos, entries, chat, load, replace_broken=True)
    drawn = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        again.set_epoch(epoch)
        sample, same = dataset[0], again[0]
        assert sample.replaced == same.replaced == ("photo 0 is cut off",)
        assert sample.photo_ids == same.photo_ids
        drawn += sample.photo_ids
        shown = int(sample.photos[sample.photo_ids[0]][0, 0, 0, 0])
        assert chat.tokenizer.decode(sample.input_ids).endswith(f"{shown}<|im_end|>\n")
    assert set(drawn) <= set(range(1, 11))
    assert len(set(drawn)) > 5
    batch = collate([dataset[0], dataset[1], dataset[0]])
    assert batch.replaced == ("photo 0 is cut off",) * 2
    assert collate([dataset[1]]).replaced == ()


def test_a_photo_that_cannot_be_read_is_named(chat):
    """Also where the sentence is about a box or a size, which many photos may have."""
    photos = {ID: Photo(ID, f"photos/{ID}.png#0,0,9,9", f"{ID}.png", None) for ID in range(2)}

    def outside(photo, epoch):
        raise UserError("the box 0,0,9,9 ends outside the photo")

    dataset = ImageCaptionDataset(photos, [one(ID, f"{TAG}\nQ", "a") for ID in range(2)], chat, outside)
    assert dataset[1] == "photos/1.png#0,0,9,9: the box 0,0,9,9 ends outside the photo"


def test_only_broken_photos_are_replaced(chat):
    entries = [one(0, f"{TAG}\nQ", "a"), one(1, f"{TAG}\nQ", "a"), one(None, "Hello", "hi")]
    alone = make(chat, entries[:1], replace_broken=True)
    alone.load_photo = broken_except()
    assert alone[0] == "photo 0 is cut off"
    text = ImageCaptionDataset(PHOTOS, entries, chat, broken_except(), replace_broken=True)[0]
    assert set(text.replaced) <= {"photo 0 is cut off", "photo 1 is cut off"}
    assert text.photos == {}
    hopeless = make(chat, entries, max_length=16, replace_broken=True)
    assert "max_length" in hopeless[0]

    def defect(photo, epoch):
        raise ValueError("not enough values to unpack")

    with pytest.raises(ValueError, match="not enough values"):
        ImageCaptionDataset(PHOTOS, entries, chat, defect, replace_broken=True)[0]


def test_a_replacement_is_no_longer_than_what_it_replaces_where_one_is_drawn(chat):
    photos = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(10)}
    entries = [one(ID, f"{TAG}\nQ", "a" * (5 if ID < 4 else 40)) for ID in range(9)] + [one(9, f"{TAG}\nQ", "a" * 90)]
    dataset = ImageCaptionDataset(photos, entries, chat, broken_except(*range(1, 10)), replace_broken=True)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        assert dataset[0].photo_ids[0] in (1, 2, 3)


def test_a_replacement_whose_question_is_too_long_becomes_a_sentence(chat):
    entries = [one(0, f"{TAG}\nQ", "a"), one(1, f"{TAG}\n{'Q' * 90}", "a")]
    dataset = ImageCaptionDataset(PHOTOS, entries, chat, broken_except(1), max_length=80, replace_broken=True)
    assert "fills 'data.max_length'" in dataset[0]


def test_photos_of_later_turns_follow_their_branch(chat):
    def dialogue(answer, *later):
        return Entry(
            "s", "s", (Turn(f"{TAG}\nA", (answer,), images=(0,)), Turn(TAG * len(later) + "B", ("two",), images=later))
        )

    entries = [dialogue("one", 1, 2), dialogue("three", 2)]
    packed = make(chat, entries, max_questions=2)
    assert packed.groups[0] == [0, 1]
    sample = packed[0]
    assert sample.photo_ids == (0, 1, 2, 2)  # the shared photo stands once, those of a branch in the branch
    assert collate([sample]).crop_index.tolist() == [0, 1, 2, 2]
    assert (sample.input_ids == chat.image_token_id).sum() == 4 * N
    alone = make(chat, entries)[0]
    first_of_answer = int((alone.labels != -100).nonzero()[0])
    assert sample.lengths[0] == first_of_answer - 1  # both ask the same; the question's last token is in each branch
    assert alone.photo_ids == (0, 1, 2)
    shorter = make(chat, entries, max_length=len(alone.input_ids) - 1)[0]
    assert shorter.photo_ids == (0,)  # the second turn was left out with its photos
    assert set(shorter.photos) == {0}


def test_a_photo_with_tiles_has_placeholders_for_each_crop(chat):
    plan, planned = VisualPlan(N, 1, 2), []
    load = lambda photo, epoch: torch.full((plan.crops, 3, 4, 4), float(photo.ID))  # noqa: E731
    dataset = ImageCaptionDataset(PHOTOS, [one(1, f"{TAG}\nA", "a"), one(1, f"{TAG}\nB", "b")], chat, load,
                                  lambda photo: planned.append(photo.ID) or plan, max_questions=2)  # fmt: skip
    sample = dataset[0]
    assert planned == [1]  # once, for both questions
    assert (sample.input_ids == chat.image_token_id).sum() == plan.tokens == 3 * N
    text = chat.tokenizer.decode(sample.input_ids[: sample.lengths[0]])
    assert text.endswith(f"{TAG * N}\n[1,1]{TAG * N}\n[1,2]{TAG * N}\n")  # then the questions differ
    assert collate([sample]).pixel_values.shape[0] == 3
    assert collate([sample, sample]).crop_index.tolist() == [0, 1, 2, 0, 1, 2]


def test_compact_list_holds_what_was_put_in():
    items = [one(0, f"{TAG}\n照片?", "a", "b"), PHOTOS[1], [1, 2], None]
    compact = CompactList(items)
    assert list(compact) == items
    assert len(compact) == 4
    assert compact[1] == items[1]
    assert list(CompactList([])) == []
    assert list(pickle.loads(pickle.dumps(compact))) == items
    for index in (-1, 4):
        with pytest.raises(IndexError):
            compact[index]


def test_spawned_workers_give_the_same_samples(chat):
    entries = [one(ID % 3, f"{TAG}\n{ID}?", *"abcd") for ID in range(6)]
    dataset = make(chat, entries)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for batch, start in zip(loader, (0, 2, 4), strict=True):
        assert torch.equal(batch.input_ids, collate([dataset[start], dataset[start + 1]]).input_ids)
