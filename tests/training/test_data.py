"""What is drawn in an epoch, where it is cut, which samples validate, and how the data sets are built."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import Prompt
from dataset.image_caption_dataset import ImageCaptionDataset
from dataset.records import Entry, Photo, Turn
from errors import UserError
from model.model import MMultiModal
from qwen.chat import ChatFormat
from qwen.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer
from training.data import build_datasets, each_answer, epoch_order, micro_batches, read_split, validation_sample
from training.estimate import longest_sample
from training.samples import choose_entries

TAG = "<|extra_0|>"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatFormat(load_tokenizer(folder), Prompt(system="S"), 3)


def question(ID, text, source):
    return Entry(source, source, (Turn(f"{TAG}\n{text}", ("a",), images=(ID,)),))


def make_dataset(chat, entries, weights):
    photos = {ID: Photo(ID, f"{ID}", f"{ID}", Path()) for ID in range(40)}
    return ImageCaptionDataset(
        photos,
        entries,
        chat,
        lambda photo: torch.zeros(3, 4, 4),
        max_questions=16,
        keep_apart=lambda source: weights.get(source, 1.0),
    )


@pytest.mark.parametrize("weights", [{}, {"b": 3.0}, {"a": 0.5}, {"a": 0.5, "b": 2.5}, {"a": 2.0, "b": 2.0}])
def test_a_weight_holds_for_every_question_of_its_source(chat, weights):
    """Both sources are on the same 40 photos, in either order."""
    entries = [question(ID, source, source) for ID in range(40) for source in ("ab" if ID % 2 else "ba")]
    dataset = make_dataset(chat, entries, weights)
    drawn = Counter()
    for index in epoch_order(dataset, weights, seed=0, epoch=0):
        drawn.update(dataset.groups[index])
    for source in "ab":
        times = [drawn[number] for number, entry in enumerate(entries) if entry.source == source]
        weight = weights.get(source, 1.0)
        assert sum(times) == 40 * weight
        assert set(times) <= {int(weight), int(weight) + (weight % 1 > 0)}
    equal = weights.get("a", 1.0) == weights.get("b", 1.0)
    assert len(dataset) == (40 if equal else 80)  # one sequence for both where it may be


def test_each_epoch_draws_its_half_by_itself(chat):
    dataset = make_dataset(chat, [question(ID, "?", "a") for ID in range(40)], {})
    halves = [set(epoch_order(dataset, {"a": 0.5}, 0, epoch)) for epoch in range(3)]
    assert all(len(half) == 20 for half in halves)
    assert 0 < len(halves[0] & halves[1]) < 20


def test_a_weight_that_draws_nothing_is_an_error_in_any_epoch(chat):
    entries = [question(ID, "?", "large") for ID in range(20)] + [question(20, "?", "small")]
    dataset = make_dataset(chat, entries, {})
    for epoch in range(3):
        with pytest.raises(UserError, match="weight 0.4 of source 'small' draws none of its 1 training samples"):
            epoch_order(dataset, {"small": 0.4}, 0, epoch)
    with pytest.raises(UserError, match="source 'large' draws none of its 20 training samples: set it to 0.05 or more"):
        epoch_order(dataset, {"large": 0.01}, 0, 0)
    assert len(epoch_order(dataset, {"large": 0.05}, 0, 0)) == 2
    with pytest.raises(UserError, match="an epoch is empty"):
        epoch_order(make_dataset(chat, [], {}), {}, 0, 0)


class Samples:
    """As much of a data set as sampling needs."""

    def __init__(self, sizes):
        numbers = iter(range(sum(sizes)))
        self.by_source = {f"s{number}": [next(numbers) for _ in range(size)] for number, size in enumerate(sizes)}

    def samples_by_source(self):
        return self.by_source

    def __len__(self):
        return sum(map(len, self.by_source.values()))


@given(st.lists(st.integers(1, 60), max_size=6), st.integers(1, 100), st.integers(0, 5))
def test_validation_sample_is_in_proportion_over_sources(sizes, count, seed):
    dataset = Samples(sizes)
    sample = validation_sample(dataset, count, seed)
    assert sample == validation_sample(dataset, count, seed)
    assert sample == sorted(set(sample))
    assert len(sample) == min(count, len(dataset))
    shares = [len(set(sample) & set(indices)) for indices in dataset.by_source.values()]
    if count >= len(sizes):
        assert all(share >= 1 for share in shares)
    for size, share in zip(sizes, shares, strict=True):
        assert share <= size
        quota = len(sample) * size / max(len(dataset), 1)
        assert abs(share - quota) <= len(sizes)  # the places that small sources take from large ones


def test_validation_sample_of_the_usual_size():
    dataset = Samples([1050, 380, 120])
    sample = validation_sample(dataset, 256, seed=0)
    shares = [len(set(sample) & set(indices)) for indices in dataset.by_source.values()]
    assert shares == [173, 63, 20]
    assert sample != validation_sample(dataset, 256, seed=1)
    assert max(sample) > 1500 > min(sample)


def flat(batches):
    return [index for batch in batches for index in batch]


orders = st.lists(st.integers(0, 19), min_size=1, max_size=60)


@given(orders, st.integers(1, 5), st.integers(1, 3), st.none() | st.integers(1, 40), st.data())
def test_the_cut_of_the_remainder_is_the_remainder_of_the_cut(order, size, processes, tokens, data):
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=20, max_size=20))
    try:
        whole = micro_batches(order, size, processes, lengths, tokens)
    except UserError:
        assert len(micro_batches(order, size, 1, lengths, tokens)) < processes
        return
    assert len(whole) % processes == 0
    assert flat(whole) == order[: sum(map(len, whole))]
    step = processes * data.draw(st.integers(1, 3))
    for taken in [*range(0, len(whole), step), len(whole)]:
        start = sum(map(len, whole[:taken]))
        assert list(micro_batches(order, size, processes, lengths, tokens, start)) == list(whole[taken:])


@given(orders, st.integers(1, 5), st.integers(1, 5), st.integers(0, 60))
def test_other_settings_go_on_with_the_next_sample(order, size, processes, start):
    rest = micro_batches(order, size, processes, start=max(start, 1))
    drawn = flat(rest)
    assert drawn == order[max(start, 1) :][: len(drawn)]
    assert len(order) - max(start, 1) - len(drawn) < size * processes  # at most one round short


def test_an_epoch_with_fewer_micro_batches_than_processes_is_an_error():
    with pytest.raises(
        UserError, match=r"2 micro-batches, fewer than the 3 processes: lower train.micro_batch \(now 4\)"
    ):
        micro_batches(list(range(5)), 4, 3)
    with pytest.raises(UserError, match=r"lower train.tokens_per_batch \(now 100\) or start fewer processes"):
        micro_batches(list(range(5)), 4, 2, [10] * 5, tokens=100)
    assert list(micro_batches(list(range(5)), 4, 3, start=4)) == []  # the rest of an epoch is left out as always
    assert list(micro_batches([], 4, 1)) == []


def built(config):
    model = MMultiModal.from_config(config, "cpu")
    return build_datasets(config, model, *read_split(config))


def test_validation_packs_by_source_and_refuses_a_broken_photo(configure, workshop, tmp_path):
    captions = json.loads((workshop / "captions.json").read_text())
    for entries in captions.values():
        entries[0]["source"] = "colours"
    image_map = json.loads((workshop / "image_map.json").read_text())
    for item in image_map.values():
        item["path"] = str(tmp_path / "gone.png")
    for name, content in (("captions", captions), ("image_map", image_map)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = {name: str(tmp_path / f"{name}.json") for name in ("captions", "image_map")}
    train, val = built(configure(data=files | {"val_fraction": 0.5}))
    assert len(val)
    for dataset, counts in ((train, {1, 3}), (val, {1, 2})):
        assert {len(group) for group in dataset.groups} == counts
    assert {val.source(index) for index in range(len(val))} == {"colours", "tiny"}
    assert "gone.png" in next(val[index] for index in range(len(val)) if len(val.groups[index]) == 2)


def test_a_weight_that_draws_nothing_is_an_error_at_build_time(configure):
    source = {"name": "tiny", "format": "jsonl", "annotations": "a", "images": "b", "weight": 0.01}
    with pytest.raises(UserError, match="weight 0.01 of source 'tiny' draws none"):
        built(configure(data={"sources": [source]}))
    with pytest.raises(UserError, match="'tine' has weight 2.0 but no entry in .*captions.json .there: tiny."):
        built(configure(data={"sources": [source | {"name": "tine", "weight": 2.0}]}))
    built(configure(data={"sources": [source | {"name": "tine", "weight": 1.0}]}))


def test_a_photo_that_turned_bad_is_replaced_in_training(configure, workshop, tmp_path):
    image_map = json.loads((workshop / "image_map.json").read_text())
    image_map["photos/3.png"]["path"] = str(tmp_path / "gone.png")
    (tmp_path / "image_map.json").write_text(json.dumps(image_map))
    train, _ = built(configure(data={"image_map": str(tmp_path / "image_map.json")}))
    samples = [train[index] for index in range(len(train))]
    assert not any(isinstance(sample, str) for sample in samples)
    assert [sentence for sample in samples for sentence in sample.replaced] == [
        f"photo not found: {tmp_path / 'gone.png'}"
    ]


def test_a_long_text_is_found_among_many_samples_with_photos(chat):
    entries = [question(ID, "a", "s") for ID in range(40)] + [Entry("s", "s", (Turn("long " * 100, ("a",)),))]
    dataset = make_dataset(chat, entries, {})
    assert list(dataset.groups[longest_sample(dataset)]) == [40]


def test_texts_that_are_cut_hide_no_longer_sample(chat):
    entries = [Entry("s", "s", (Turn("Q", ("long " * 3000,)),)) for _ in range(40)]
    packed = [Entry("s", "s", (Turn(f"{TAG}\n{letter * 700}", ("a",), images=(0,)),)) for letter in "abcdefghijkl"]
    dataset = make_dataset(chat, [*entries, *packed], {})
    lengths = [dataset.length(index) for index in range(len(dataset))]
    assert max(lengths) > dataset.max_length
    assert lengths[longest_sample(dataset)] == max(lengths)


def test_no_sample_is_longer_than_the_context(configure, tmp_path):
    captions = {"0": [{"source": "s", "turns": [{"q": f"{TAG}{'a' * 300}", "a": ["b" * 300]}] + [
        {"q": "c" * 300, "a": ["d" * 300]} for _ in range(3)
    ]}]}  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    photos = {"photos/0.jpg": {"ID": 0, "image_file": "0.jpg", "path": str(tmp_path / "0.jpg")}}
    (tmp_path / "image_map.json").write_text(json.dumps(photos))
    files = {"image_map": str(tmp_path / "image_map.json"), "captions": str(tmp_path / "captions.json")}
    config = configure(data=files | {"max_length": 2048, "val_fraction": 0.0})
    model = MMultiModal.from_config(config)
    train, _ = build_datasets(config, model, *read_split(config))
    assert 600 < len(train.tokens(0).input_ids) <= model.language_model.longest_packed == 1024


def test_shown_questions_have_all_their_answers_again():
    """`samples.html` judges by all answers, also where `data.answers: all` makes each an entry."""
    entries = [replace(question(ID, "Which?", "s"), type=str(ID)) for ID in range(3)]
    entries = [replace(entry, turns=(replace(entry.turns[0], answers=("a", "b", "b")),)) for entry in entries]
    assert sorted(choose_entries(each_answer(entries), 10, seed=0), key=lambda entry: entry.type) == entries


def test_each_answer_is_a_sample_of_its_own(configure, tmp_path):
    """`data.answers: all`: five captions of a photo are five questions behind one photo; dialogues stay."""
    captions = {
        "0": [{"source": "captions", "q": f"{TAG}\nWhat?", "a": ["one", "two", "three"]}],
        "1": [{"source": "talk", "turns": [{"q": f"{TAG}\nA?", "a": ["b", "c"]}, {"q": "D?", "a": ["e"]}]}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    photos = {
        f"photos/{ID}.jpg": {"ID": ID, "image_file": f"{ID}.jpg", "path": str(tmp_path / f"{ID}.jpg")} for ID in (0, 1)
    }
    (tmp_path / "image_map.json").write_text(json.dumps(photos))
    files = {"image_map": str(tmp_path / "image_map.json"), "captions": str(tmp_path / "captions.json")}
    found = {}
    for answers in ("one", "all"):
        config = configure(data=files | {"answers": answers, "val_fraction": 0.0})
        train, _ = build_datasets(config, MMultiModal.from_config(config), *read_split(config))
        found[answers] = [train.tokens(index) for index in range(len(train))]
        assert len(train) == 2
    supervised = {key: [int((sample.labels != -100).sum()) for sample in own] for key, own in found.items()}
    words = [len(text) + 1 for text in ("one", "two", "three")]  # a byte is a token, and one ends the answer
    assert supervised["all"][0] == sum(words)
    assert supervised["one"][0] in words
    assert len(found["all"][0].lengths) == 4  # the photo, and three branches
    assert supervised["all"][1] == supervised["one"][1] == 4
