"""The contrastive term: by its definition, off without a trace, and learned."""

import pytest
import torch

from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo, Turn
from errors import UserError
from model.contrastive import TEMPERATURE, contrastive_loss
from model.model import MMultiModal
from tests.tiny import IMAGE_SIZE, tiny_config
from training.loop import Trainer

TAG = "<|extra_0|>"


def make_batch(model, images, answers):
    """One question on each of `images` (an ID or several; None: text alone)."""
    entries = []
    for ID, answer in zip(images, answers, strict=True):
        shown = () if ID is None else ID if isinstance(ID, tuple) else (ID,)
        question = f"{TAG * len(shown)}\nWhat?" if shown else "What?"
        entries.append(Entry("s", "s", (Turn(question, (answer,), images=shown),)))
    photos = {ID: Photo(ID, f"{ID}", f"{ID}", None) for ID in range(4)}
    pixels = torch.randn(4, 1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    dataset = ImageCaptionDataset(photos, entries, model.processor.chat, lambda photo, epoch: pixels[photo.ID])
    return collate([dataset[index] for index in range(len(dataset))])


@pytest.fixture(scope="module")
def model(backbones):
    torch.manual_seed(0)
    model = MMultiModal.from_config(tiny_config(backbones)).train()
    for parameter in model.feature_proj.parameters():
        parameter.data.normal_(std=0.2)
    return model


def by_definition(model, batch, rows_of_samples):
    """Written out sample by sample in float64; `rows_of_samples`: (sample, photo) of those that count."""
    embeddings, _ = model._embed(batch)
    starts = [0]
    for lengths in batch.lengths:
        starts.append(starts[-1] + sum(lengths))
    photos, texts = [], []
    for sample, _ in rows_of_samples:
        inside = slice(starts[sample], starts[sample + 1])
        rows, ids, labels = embeddings[0, inside].double(), batch.input_ids[0, inside], batch.labels[0, inside]
        photo = rows[ids == model.processor.chat.image_token_id].mean(0)
        text = rows[labels != -100].mean(0)
        photos.append(photo / photo.norm())
        texts.append(text / text.norm())
    total = 0.0
    for i, (_, own) in enumerate(rows_of_samples):
        allowed = [j for j, (_, other) in enumerate(rows_of_samples) if j == i or other != own]
        forth = torch.stack([(photos[i] @ texts[j] / TEMPERATURE).exp() for j in allowed])
        back = torch.stack([(photos[j] @ texts[i] / TEMPERATURE).exp() for j in allowed])
        own_score = (photos[i] @ texts[i] / TEMPERATURE).exp()
        total = total - (own_score / forth.sum()).log() / 2 - (own_score / back.sum()).log() / 2
    return total / len(rows_of_samples)


def test_equals_the_definition(model):
    batch = make_batch(model, [0, 1, None, 0, 2], ["red", "blue and green", "hi", "yes", "no"])
    embeddings, _ = model._embed(batch)
    term = contrastive_loss(batch, embeddings, model.processor.chat.image_token_id)
    expected = by_definition(model, batch, [(0, 0), (1, 1), (3, 0), (4, 2)])
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)  # float32 against float64
    term.backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.feature_proj.parameters())
    model.zero_grad()


def test_cosines_are_not_rounded_under_autocast(model):
    batch = make_batch(model, [0, 1, 2], ["red", "blue", "no"])
    with torch.no_grad():
        embeddings, _ = model._embed(batch)
        exact = contrastive_loss(batch, embeddings, model.processor.chat.image_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            assert contrastive_loss(batch, embeddings, model.processor.chat.image_token_id) == exact


def test_only_samples_with_all_photos_in_common_are_copies(model):
    batch = make_batch(model, [(0, 1), (0, 2), (0, 1), 0], ["red", "blue and green", "yes", "no"])
    embeddings, _ = model._embed(batch)
    term = contrastive_loss(batch, embeddings, model.processor.chat.image_token_id)
    expected = by_definition(model, batch, list(enumerate([(0, 1), (0, 2), (0, 1), 0])))
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)  # float32 against float64


@pytest.mark.parametrize("images", [[0], [None, 0], [1, 1]])
def test_needs_two_photos(model, images):
    batch = make_batch(model, images, ["a"] * len(images))
    embeddings, _ = model._embed(batch)
    assert contrastive_loss(batch, embeddings, model.processor.chat.image_token_id) == 0


def test_is_added_in_training_mode_alone_with_its_share_of_the_step(backbones):
    model = MMultiModal.from_config(tiny_config(backbones, train={"contrastive_weight": 0.5}))
    batch = make_batch(model, [0, 1], ["red", "blue"])
    term = contrastive_loss(batch, model._embed(batch)[0], model.processor.chat.image_token_id)
    assert term > 0
    labels = int((batch.labels[:, 1:] != -100).sum())
    for count, share in ((None, 1.0), (4 * labels, 0.25)):
        difference = model.train().loss(batch, count) - model.eval().loss(batch, count)
        assert difference.item() == pytest.approx(0.5 * share * term.item(), rel=1e-4)


def test_zero_changes_no_bit_and_more_lowers_it(backbones, tmp_path):
    def trained(name, **train):
        settings = {"max_steps": 30, "micro_batch": 6, "trackers": [], "output_dir": str(tmp_path / name)} | train
        config = tiny_config(backbones, train=settings | {"precision": "float32", "workers": 0, "projector_lr": 1e-2})
        trainer = Trainer(config)
        trainer.run()
        return trainer

    plain, zero = trained("plain"), trained("zero", contrastive_weight=0.0)
    more = trained("more", contrastive_weight=5.0)
    for name, parameter in plain.model.feature_proj.named_parameters():
        assert torch.equal(parameter, zero.model.feature_proj.get_parameter(name))
    terms = []
    for trainer in (plain, more):
        one_a_photo = {trainer.train_set.tokens(index).photo_ids: index for index in range(len(trainer.train_set))}
        batch = collate([trainer.train_set[index] for index in one_a_photo.values()])
        with torch.no_grad():
            embeddings, _ = trainer.model._embed(batch)
            terms.append(contrastive_loss(batch, embeddings, trainer.model.processor.chat.image_token_id).item())
    assert terms[1] < 0.8 * terms[0]


def test_a_micro_batch_of_one_is_refused(backbones):
    with pytest.raises(UserError, match="'contrastive_weight' compares the photos of a micro-batch"):
        tiny_config(backbones, train={"contrastive_weight": 0.1, "micro_batch": 1})
    with pytest.raises(UserError, match="'contrastive_weight' compares the photos of a micro-batch"):
        tiny_config(backbones, train={"contrastive_weight": 0.1, "micro_batch": "auto", "samples_per_step": 4})
