"""Packed questions give the loss and every gradient of the separate samples."""

import pytest
import torch

from batch import sample_positions
from compat import set_activation_checkpointing
from dataset.grouping import group_entries
from dataset.image_caption_dataset import ImageCaptionDataset, collate, pack
from dataset.records import Entry, Photo, Turn
from model.model import MMultiModal
from qwen.attention import PackedMask, shared_prefix_attention
from tests.tiny import IMAGE_SIZE, fill_trained, tiny_config, write_qwen, write_qwen1, write_siglip

# relative in norm, per tensor; the sums run in another order
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    write_siglip(folder / "siglip")
    for kind in ("qwen2", "qwen3", "llama"):
        write_qwen(folder / kind, kind)
    write_qwen1(folder / "qwen1")
    # a window shorter than the photo, so that a mask without it would differ
    sliding = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    write_qwen(folder / "sliding", "qwen2", **sliding)
    return folder


def positions_of(samples):
    return torch.cat([sample_positions(lengths) for lengths in samples])


def brute_force_mask(samples):
    """(1, 1, T, T) bool by the definition, token by token."""
    tokens = [(s, b) for s, lengths in enumerate(samples) for b, size in enumerate(lengths) for _ in range(size)]
    mask = torch.zeros(1, 1, len(tokens), len(tokens), dtype=torch.bool)
    for i, (sample, branch) in enumerate(tokens):
        for j in range(i + 1):
            mask[0, 0, i, j] = tokens[j] == (sample, branch) or tokens[j] == (sample, 0)
    return mask


def test_pack_lays_branches_behind_the_prefix():
    first = ([7, 8, 1, 2], [-100, -100, -100, 2])
    second = ([7, 8, 3, 4, 5], [-100, -100, -100, 4, 5])
    input_ids, labels, lengths = pack([first, second])
    assert input_ids == [7, 8, 1, 2, 3, 4, 5]
    assert labels == [-100, -100, -100, 2, -100, 4, 5]
    assert lengths == (2, 2, 3)
    assert positions_of((lengths, (2,))).tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1]


def test_answers_to_one_question_share_all_of_it_but_its_last_token():
    first = ([7, 8, 9, 1, 2], [-100, -100, -100, 1, 2])
    second = ([7, 8, 9, 1, 3, 4], [-100, -100, -100, 1, 3, 4])
    input_ids, labels, lengths = pack([first, second])
    assert input_ids == [7, 8, 9, 1, 2, 9, 1, 3, 4]
    assert labels == [-100, -100, -100, 1, 2, -100, 1, 3, 4]
    assert lengths == (2, 3, 4)
    # an answer that starts earlier ends the prefix earlier
    assert pack([first, ([7, 8, 9], [-100, -100, 9])])[2] == (1, 4, 2)


LAYOUTS = [((5,),), ((5, 3),), ((4, 1, 6, 2), (7,)), ((9,), (1, 2), (3, 1, 1, 1, 1, 1, 1, 1, 1), (20, 8, 8))]


@pytest.mark.parametrize("samples", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_equals_the_definition(samples, window):
    positions = positions_of(samples)
    mask = brute_force_mask(samples)
    if window is not None:
        mask &= positions[:, None] - positions[None, :] < window
    torch.manual_seed(0)
    length = len(positions)
    query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (6, 2, 2))
    outer = torch.randn(1, length, 6, 8)

    def gradients(mask):
        rows, _ = shared_prefix_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
        return rows, *torch.autograd.grad(rows, (query, key, value), outer)

    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.3
    expected = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    expected = (expected, *torch.autograd.grad(expected, (query, key, value), outer))
    for ours, plain in zip(gradients(PackedMask(samples, window)), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def entry(image, question, answer, source="a"):
    images = () if image is None else (image,)
    return Entry(source, source, (Turn(question, (answer,), images=images),))


def grouped(entries, image_first, most, keep_apart=None):
    return list(group_entries(entries, image_first, most, keep_apart and keep_apart.get).entries)


def test_groups_share_photo_and_text_before_it():
    tag = "<|extra_0|>"
    entries = [
        entry(0, f"{tag}\nA?", "1"),
        entry(1, f"{tag}\nA?", "2"),
        entry(0, f"{tag}\nB?", "3"),
        entry(0, f"C? {tag}", "4"),
        entry(None, "D?", "5"),
        entry(0, f"{tag}\nE?", "6"),
    ]
    assert grouped(entries, False, 8) == [[0, 2, 5], [1], [3], [4]]
    assert grouped(entries, False, 2) == [[0, 2], [1], [3], [4], [5]]
    assert grouped(entries, True, 8) == [[0, 2, 3, 5], [1], [4]]
    assert grouped(entries, False, 1) == [[0], [1], [2], [3], [4], [5]]


def test_groups_keep_sources_apart_that_differ():
    entries = [entry(0, f"<|extra_0|>\n{number}?", "x", source) for number, source in enumerate("abcab")]
    assert grouped(entries, False, 8) == [[0, 1, 2, 3, 4]]
    assert grouped(entries, False, 8, {"a": 1.0, "b": 1.0, "c": 1.0}) == [[0, 1, 2, 3, 4]]
    assert grouped(entries, False, 8, {"a": 1.0, "b": 0.5, "c": 1.0}) == [[0, 2, 3], [1, 4]]
    assert grouped(entries, False, 8, {"a": "a", "b": "b", "c": "c"}) == [[0, 3], [1, 4], [2]]


TAG = "<|extra_0|>"


def build(backbones, kind, dtype=torch.float32, **train):
    """A model with LoRA and projector that do something, in training mode."""
    llm = {"path": str(backbones / kind), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    model = MMultiModal.from_config(tiny_config(backbones, llm=llm, train=train))
    fill_trained(model, seed=0)
    return model.to(dtype).train()


def random_pixels(count):
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def make_dataset(model, entries, pixels, max_questions):
    photos = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(len(pixels))}
    return ImageCaptionDataset(
        photos, entries, model.processor.chat, lambda photo, _: pixels[photo.ID][None], max_questions=max_questions
    )


def summed_loss_and_gradients(model, dataset, batch_size):
    model.zero_grad()
    total = 0.0
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])
        loss = model.loss(batch, 1)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["qwen1", "qwen2", "qwen3", "llama", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_separate_samples(backbones, kind, dtype, checkpointing):
    model = build(backbones, kind, dtype)
    if checkpointing:
        set_activation_checkpointing(model.language_model, True)
    entries = [entry(0, f"{TAG}\nquestion {number}?", f"answer {number}" * number) for number in range(1, 9)]
    entries += [entry(1, f"{TAG}\nHow many?", "two"), entry(1, f"What? {TAG}", "that"), entry(None, "Hello", "hi")]
    entries += [entry(2, f"{TAG}\nWhere?", "here"), entry(2, f"{TAG}\nWho?", "nobody")]
    entries += [Entry("a", "a", (Turn(f"{TAG}{TAG}\nSame?", ("no",), images=(2, 0)),))]
    # several answers to one question, and a dialogue that starts with one of them
    what = Turn(f"{TAG}\nWhat?", ("a dog",), images=(3,))
    entries += [entry(3, what.question, "a big dog"), Entry("a", "a", (what,)), entry(3, what.question, "one")]
    entries += [Entry("a", "a", (what, Turn("Where?", ("here",))))]
    pixels = random_pixels(4)
    loss, gradients = summed_loss_and_gradients(model, make_dataset(model, entries, pixels, 1), 1)
    for batch_size in (3, 9):  # two photos in a sample and one in several samples
        dataset = make_dataset(model, entries, pixels, 8)
        packed_loss, packed_gradients = summed_loss_and_gradients(model, dataset, batch_size)
        assert packed_loss == pytest.approx(loss, rel=2e-6 if dtype == torch.float32 else 1e-12)
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, f"{name} has no gradient"
            error = (packed_gradients[name] - gradient).norm() / gradient.norm()
            assert error < TOLERANCE[dtype], f"{name}: {error}"


@pytest.mark.parametrize("questions", range(1, 9))
def test_any_number_of_questions_equals_the_separate_samples(backbones, questions):
    model = build(backbones, "qwen2")
    entries = [entry(0, f"{TAG}\nquestion {number}?", "word " * number) for number in range(1, questions + 1)]
    pixels = random_pixels(1)
    loss, gradients = summed_loss_and_gradients(model, make_dataset(model, entries, pixels, 1), 1)
    dataset = make_dataset(model, entries, pixels, 8)
    assert len(dataset) == 1
    packed_loss, packed_gradients = summed_loss_and_gradients(model, dataset, 1)
    assert packed_loss == pytest.approx(loss, rel=2e-6)
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() < TOLERANCE[torch.float32] * gradient.norm(), name


@pytest.mark.parametrize("counts", [(1, 1), (1, 3, 2), (8, 1, 5), (2, 2, 2, 2)])
@torch.no_grad()
def test_photos_of_a_row_do_not_leak_by_a_bit(backbones, counts):
    """Another photo and other answers in one sample leave every logit of the others as they were, bit by bit."""
    model = build(backbones, "qwen2").eval()
    pixels = random_pixels(len(counts) + 1)

    def logits_by_sample(changed):
        entries = [
            entry(ID, f"{TAG}\nquestion {number}?", "xyz" if changed == ID else "abc")
            for ID, count in enumerate(counts)
            for number in range(count)
        ]
        shown = pixels[:-1].clone()
        if changed is not None:
            shown[changed] = pixels[-1]
        batch = collate(list(make_dataset(model, entries, shown, 8)))
        return model.logits(batch)[0].split([sum(lengths) for lengths in batch.lengths])

    before = logits_by_sample(None)
    for changed in range(len(counts)):
        for sample, (first, second) in enumerate(zip(before, logits_by_sample(changed), strict=True)):
            assert torch.equal(first, second) == (sample != changed)


@torch.no_grad()
def test_a_branch_does_not_see_its_neighbour(backbones):
    model = build(backbones, "qwen2").eval()

    def last_logits(first_answer):
        entries = [entry(0, f"{TAG}\nA?", first_answer), entry(0, f"{TAG}\nB?", "same")]
        batch = collate([make_dataset(model, entries, random_pixels(1), 2)[0]])
        return model.logits(batch)[:, -6:]

    assert torch.equal(last_logits("xyz"), last_logits("abc"))


def test_a_photo_is_encoded_once_and_without_a_graph(backbones):
    model = build(backbones, "qwen2")
    seen = []
    model.encoder.register_forward_hook(lambda encoder, inputs, output: seen.append(output))
    entries = [entry(0, f"{TAG}\nA?", "1"), entry(0, f"A? {TAG}", "1"), entry(1, f"{TAG}\nA?", "1")]
    batch = collate(list(make_dataset(model, entries, random_pixels(2), 8)))
    model.loss(batch).backward()
    (features,) = seen
    assert len(features) == 2
    assert features.grad_fn is None
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
