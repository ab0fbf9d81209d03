"""Packed questions give the loss and every gradient of the separate samples."""

import pytest
import torch

from dataset.image_caption_dataset import ImageCaptionDataset, collate, group_entries
from dataset.packing import branch_mask, pack
from dataset.records import Entry, Photo, Turn
from model.model import MMultiModal
from tests.tiny import IMAGE_SIZE, tiny_config, write_qwen, write_siglip

# relative in norm, per tensor; the sums run in another order
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    write_siglip(folder / "siglip")
    for kind in ("qwen2", "qwen3"):
        write_qwen(folder / kind, kind)
    # a window shorter than the photo, so that a mask without it would differ
    sliding = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    write_qwen(folder / "sliding", "qwen2", **sliding)
    return folder


def brute_force_mask(branch):
    rows = branch.tolist()
    mask = torch.zeros(len(rows), 1, len(rows[0]), len(rows[0]), dtype=torch.bool)
    for b, row in enumerate(rows):
        for i, looker in enumerate(row):
            for j in range(i + 1):
                mask[b, 0, i, j] = i == j or (looker != -1 and row[j] in (0, looker))
    return mask


def test_branch_mask_equals_the_definition():
    branch = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, -1, -1]])
    assert torch.equal(branch_mask(branch), brute_force_mask(branch))


def test_pack_lays_branches_behind_the_prefix():
    first = ([7, 8, 1, 2], [-100, -100, -100, 2])
    second = ([7, 8, 3, 4, 5], [-100, -100, -100, 4, 5])
    packed = pack([first, second], prefix_length=2)
    assert packed["input_ids"].tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert packed["labels"].tolist() == [-100, -100, -100, 2, -100, 4, 5]
    assert packed["position_ids"].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert packed["branch"].tolist() == [0, 0, 1, 1, 2, 2, 2]
    with pytest.raises(AssertionError, match="share their prefix"):
        pack([first, ([9, 8, 3], [-100] * 3)], prefix_length=2)


def entry(image, question, answer, source="a"):
    images = () if image is None else (image,)
    return Entry(images, source, source, (Turn(question, (answer,)),))


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
    assert group_entries(entries, False, 8) == [[0, 2, 5], [1], [3], [4]]
    assert group_entries(entries, False, 2) == [[0, 2], [1], [3], [4], [5]]
    assert group_entries(entries, True, 8) == [[0, 2, 3, 5], [1], [4]]
    assert group_entries(entries, False, 1) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_separate_samples(backbones, kind, dtype, checkpointing):
    model = MMultiModal.from_config(
        tiny_config(backbones, llm={"path": str(backbones / kind), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}})
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    model.to(dtype).train()
    if checkpointing:
        model.LLM.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(1)
    pixels = {ID: torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for ID in range(3)}
    photos = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in pixels}
    tag = "<|extra_0|>"
    entries = [entry(0, f"{tag}\nquestion {number}?", f"answer {number}" * number) for number in range(1, 9)]
    entries += [entry(1, f"{tag}\nHow many?", "two"), entry(1, f"What? {tag}", "that"), entry(None, "Hello", "hi")]
    entries += [entry(2, f"{tag}\nWhere?", "here"), entry(2, f"{tag}\nWho?", "nobody")]

    def summed_loss_and_gradients(max_questions, batch_size):
        dataset = ImageCaptionDataset(
            photos, entries, model.chat, lambda photo: pixels[photo.ID], max_questions=max_questions
        )
        model.zero_grad()
        total = 0.0
        for start in range(0, len(dataset), batch_size):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            batch = collate(samples, pad_id=0)
            image = batch.pop("pixel_values", None)
            loss = model(
                None if image is None else image.to(dtype), **batch, supervised_only=True, num_items_in_batch=1
            ).loss
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    loss, gradients = summed_loss_and_gradients(1, 1)
    packed_loss, packed_gradients = summed_loss_and_gradients(8, 3)
    # the loss itself is summed in float32
    assert packed_loss == pytest.approx(loss, rel=2e-6)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, f"{name} has no gradient"
        error = (packed_gradients[name] - gradient).norm() / gradient.norm()
        assert error < TOLERANCE[dtype], f"{name}: {error}"


def test_a_branch_does_not_see_its_neighbour(backbones):
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(backbones / "qwen2")})).eval()
    tag = "<|extra_0|>"
    pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))

    def last_logits(first_answer):
        entries = [entry(0, f"{tag}\nA?", first_answer), entry(0, f"{tag}\nB?", "same")]
        dataset = ImageCaptionDataset(
            {0: Photo(0, "0", "0", None)}, entries, model.chat, lambda _: pixels, max_questions=2
        )
        batch = collate([dataset[0]], pad_id=0)
        del batch["labels"]
        return model(batch.pop("pixel_values"), **batch, logits_to_keep=6).logits

    with torch.no_grad():
        assert torch.equal(last_logits("xyz"), last_logits("abc"))
