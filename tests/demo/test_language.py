"""Pretraining of the demo's language model: packed rows of scenes against transformers' own Qwen2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2ForCausalLM

from batch import sample_positions
from dataset.image_caption_dataset import ImageCaptionDataset
from dataset.records import Entry, Photo, Turn
from demo import language
from demo.language import IMAGE_TOKENS, NOISE, SceneReader, SceneWriter, _store, score
from demo.pretrain import BACKBONES
from demo.world import random_scene
from qwen.attention import ATTENTION
from qwen.chat import IGNORE_INDEX
from qwen.tokenizer import load_tokenizer

PATCHES = 9  # shown of a soft scene: enough for five objects


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BACKBONES / "qwen")


def make_reader(tokenizer):
    torch.manual_seed(0)
    return SceneReader(tokenizer)


def visible_tokens(samples):
    """(T, T) bool by the definition, token by token: the prefix of its own sample, and its own branch up to itself."""
    owner = [
        (sample, branch)
        for sample, lengths in enumerate(samples)
        for branch, length in enumerate(lengths)
        for _ in range(length)
    ]
    visible = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for row, (sample, branch) in enumerate(owner):
        for column in range(row + 1):
            visible[row, column] = owner[column] in ((sample, 0), (sample, branch))
    return visible


def plain_loss(reader, batch):
    """The loss through transformers' own Qwen2, with a dense mask over the row and all its logits."""
    stock = Qwen2ForCausalLM(reader.language.config)
    stock.set_attn_implementation("eager")
    stock.model, stock.lm_head = reader.language.model, reader.language.lm_head
    embedded = reader.language.get_input_embeddings()(batch.input_ids)[0]  # (T, D)
    if batch.image_features is not None:
        patches = iter(reader.soft_patches(batch.image_features, 0.0).flatten(0, 1))
        image = reader.language.image_token_id
        embedded = torch.stack(
            [
                next(patches) if token == image else row
                for token, row in zip(batch.input_ids[0].tolist(), embedded, strict=True)
            ]
        )
    mask = torch.zeros(len(embedded), len(embedded)).masked_fill(~visible_tokens(batch.lengths), -torch.inf)
    reader.language.set_attn_implementation("eager")
    logits = stock(
        inputs_embeds=embedded[None], position_ids=batch.position_ids, attention_mask=mask[None, None], use_cache=False
    ).logits[0]
    reader.language.set_attn_implementation(ATTENTION)
    return cross_entropy(logits[:-1], batch.labels[0, 1:])  # leaves out labels of -100


@pytest.mark.parametrize("kind", ["questions", "dialogues", "sentences", "regions", "caption first", "text"])
def test_loss_and_gradients_equal_the_definition(tokenizer, kind):
    reader = make_reader(tokenizer)
    batch, types = SceneWriter(tokenizer, np.random.default_rng(1)).batch(kind, 2, PATCHES)
    assert len(batch.lengths) == 2
    assert [len(row) + 1 for row in types] == [len(lengths) for lengths in batch.lengths]
    loss, expected = reader.loss(batch, 0.0), plain_loss(reader, batch)
    # float32 and sums in another order: relative in norm, the bar of packed training
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    learns = reader.language if kind == "text" else reader  # words do not use the vectors of soft scenes
    names, weights = zip(*learns.named_parameters(), strict=True)
    pairs = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True)
    for name, (ours, plain) in zip(names, pairs, strict=True):
        assert plain.norm() > 0
        assert (ours - plain).norm() <= 2e-5 * plain.norm(), name


@pytest.mark.parametrize(("kind", "photos"), [("questions", 1), ("regions", 2)])
def test_patches_keep_their_positions(tokenizer, kind, photos):
    """A row of which few patches are shown is a whole row without the columns of the others."""
    writer = SceneWriter(tokenizer, np.random.default_rng(2))
    state = writer.rng.bit_generator.state
    few, _ = writer.batch(kind, 1, PATCHES)
    writer.rng.bit_generator.state = state
    whole, _ = writer.batch(kind, 1, IMAGE_TOKENS)
    lengths = whole.lengths[0]
    assert whole.position_ids[0].equal(sample_positions(lengths))
    image = writer.formats[0].image_token_id
    first = whole.input_ids[0].tolist().index(image)
    places = few.position_ids[few.input_ids == image]
    assert len(places) == PATCHES * photos
    assert places.diff().min() > 0
    text_columns = [*range(first), *range(first + IMAGE_TOKENS * photos, sum(lengths))]
    shown = few.input_ids[0] != image
    for name in ("input_ids", "labels", "position_ids"):
        assert getattr(few, name)[0, shown].equal(getattr(whole, name)[0, text_columns]), name
    # every object is shown, at its own place
    all_values, few_values = (batch.image_features.flatten(0, 1) for batch in (whole, few))
    has_object, seen = all_values[:, 0] >= 0, few_values[:, 0] >= 0
    assert (places[seen] - first).equal(has_object.nonzero()[:, 0])
    assert few_values[seen].equal(all_values[has_object])


def test_score_asks_each_question_by_itself(tokenizer):
    """Shares of right answers = those of one row a question through transformers' own model."""
    reader = make_reader(tokenizer)
    stock = Qwen2ForCausalLM.from_pretrained(BACKBONES / "qwen", dtype=torch.float32)
    reader.language.load_state_dict(stock.state_dict())
    right, total = {}, {}
    batch, types = SceneWriter(tokenizer, np.random.default_rng(3)).batch("text", 16, PATCHES)
    start = 0
    for lengths, names in zip(batch.lengths, types, strict=True):
        parts = torch.arange(start, start := start + sum(lengths)).split(lengths)
        columns = [torch.cat([parts[0], branch]) for branch in parts[1:]]  # of each question
        ids = pad_sequence([batch.input_ids[0, own] for own in columns], batch_first=True)  # on the right: no one looks
        labels = pad_sequence([batch.labels[0, own] for own in columns], batch_first=True, padding_value=IGNORE_INDEX)
        with torch.inference_mode():
            best = stock(input_ids=ids).logits[:, :-1].argmax(-1)
        hits = (best == labels[:, 1:]) | (labels[:, 1:] == IGNORE_INDEX)
        for (name,), hit in zip(names, hits.all(1).tolist(), strict=True):
            right[name] = right.get(name, 0) + hit
            total[name] = total.get(name, 0) + 1
    scores = score(reader, tokenizer, 3, 16, PATCHES, "text")
    assert {name: scores[name] for name in total} == {name: round(right[name] / total[name], 4) for name in total}
    assert scores["all"] == round(sum(right.values()) / sum(total.values()), 4) > 0


def test_stored_folder_is_a_stock_checkpoint(tokenizer, tmp_path):
    reader = make_reader(tokenizer)
    before = torch.random.get_rng_state()
    settings = reader.language.config.to_dict()
    _store(reader.language, tokenizer, tmp_path)
    assert reader.language.config.to_dict() == settings
    assert torch.random.get_rng_state().equal(before)  # so that storing now and then does not change the run
    for name in ("config.json", "generation_config.json"):
        ours, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, BACKBONES / "qwen"))
        assert ours | {"transformers_version": ""} == shipped | {"transformers_version": ""}
    stock, info = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    written = stock.state_dict()
    assert all(weight.bfloat16().equal(written[name]) for name, weight in reader.language.state_dict().items())


def test_each_answer_of_a_dialogue_is_scored(tokenizer):
    """The shares are those of the answers that a search from each end token backwards finds."""
    reader = make_reader(tokenizer)
    stock = Qwen2ForCausalLM.from_pretrained(BACKBONES / "qwen", dtype=torch.float32)
    reader.language.load_state_dict(stock.state_dict())
    writer = SceneWriter(tokenizer, np.random.default_rng(4))
    batch, types = writer.batch("dialogues", 16, PATCHES)
    right, total = {}, {}
    torch.manual_seed(1)  # of the noise of the soft scenes
    with torch.inference_mode():
        hits = reader.hits(batch, NOISE)
    start = 0
    for lengths, branches in zip(batch.lengths, types, strict=True):
        parts = torch.arange(start, start := start + sum(lengths)).split(lengths)
        for places, names in zip(parts[1:], branches, strict=True):
            ends = [place for place in places.tolist() if batch.labels[0, place] == writer.formats[0].answer_end_id]
            assert len(ends) == len(names)
            for turn, end in enumerate(ends):
                first = end
                while batch.labels[0, first - 1] != IGNORE_INDEX:
                    first -= 1
                name = "follow-up" if turn else names[0]
                right[name] = right.get(name, 0) + bool(hits[first : end + 1].all())
                total[name] = total.get(name, 0) + 1
    torch.manual_seed(1)
    scores = score(reader, tokenizer, 4, 16, PATCHES, "dialogues")
    assert {name: scores[name] for name in total} == {name: round(right[name] / total[name], 4) for name in total}
    assert total["follow-up"] == sum(len(names) - 1 for branches in types for names in branches)


def test_dialogues_are_rendered_as_in_training(tokenizer):
    """A scene with its dialogues = the sample that the product makes of the same dialogues on a photo."""
    writer = SceneWriter(tokenizer, np.random.default_rng(5))
    state = writer.rng.bit_generator.state
    batch, types = writer.batch("dialogues", 1, IMAGE_TOKENS)
    writer.rng.bit_generator.state = state
    branches = writer._branches(random_scene(writer.rng), "dialogues")
    chat = writer.formats[int(writer.rng.integers(len(writer.formats)))]
    assert types == [[[name for name, _, _ in branch] for branch in branches]]
    assert {len(branch) for branch in branches} <= {2, 3, 4}
    entries = []
    for branch in branches:
        texts = [(question, (answer,)) for _, question, answer in branch]
        turns = (Turn(*text, images=() if number else (0,)) for number, text in enumerate(texts))
        entries.append(Entry("drawn", "dialogue", tuple(turns)))
    photo = Photo(0, "photo", "photo.jpg", Path("photo.jpg"))
    dataset = ImageCaptionDataset({0: photo}, entries, chat, lambda photo, epoch: torch.zeros(1), max_questions=16)
    (sample,) = [dataset.tokens(index) for index in range(len(dataset))]
    assert batch.input_ids[0].equal(sample.input_ids)
    assert batch.labels[0].equal(sample.labels)
    assert batch.lengths == (sample.lengths,)
    answers = sum(len(chat.encode_text(answer)) + 1 for branch in branches for _, _, answer in branch)
    assert (batch.labels != IGNORE_INDEX).sum() == answers  # every answer is supervised


def pretrain_in_a_process(rank, folder):
    """Three steps of the last phase; keep the weights after them, and which questions this process saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    language.ENGLISH_STEPS = language.PLAIN_STEPS = language.QUESTION_STEPS = 0
    language.score, language._store = lambda *_: {}, lambda *_: None
    seen, take_step, make_batch = {"kinds": [], "ids": []}, language.take_step, SceneWriter.batch

    def batch(writer, kind, size, patches):
        made, types = make_batch(writer, kind, size, patches)
        seen["kinds"].append((kind, size, patches))
        seen["ids"].append(made.input_ids)
        return made, types

    def step(optimizers, reader):
        take_step(optimizers, reader)
        seen["weights"] = torch.cat([weight.detach().flatten() for weight in reader.parameters()])

    SceneWriter.batch, language.take_step = batch, step
    seen["scores"] = language.pretrain(load_tokenizer(BACKBONES / "qwen"), folder, 3, 0, lambda _: None)
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_same_steps_on_scenes_of_their_own(tmp_path):
    torch.multiprocessing.spawn(pretrain_in_a_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert first["kinds"] == second["kinds"]
    assert {size for kind, size, _ in first["kinds"] if kind == "questions"} <= {1, 3}
    assert not any(torch.equal(*pair) for pair in zip(first["ids"], second["ids"], strict=True))
    assert set(first["scores"]) > {"text"}
    assert second["scores"] == {}
