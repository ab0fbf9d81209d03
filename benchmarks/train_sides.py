"""Models, data and sides of `benchmarks/train_step.py`; other benchmarks of training build on them.

A side is a function of the backbones' folder, the options and the questions per photo. It returns a model and the
losses of one optimizer step. `train_step.py` describes the sides.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from batch import Batch
from compat import set_activation_checkpointing
from config import parse_config
from dataset.image_caption_dataset import ImageCaptionDataset, Sample, collate
from dataset.records import Entry, Photo, Turn
from model.model import MMultiModal
from paths import REPO_ROOT
from qwen.chat import IGNORE_INDEX
from qwen.lora import LoraLinear
from training.batches import checked
from training.build import compile_layers

DEMO = REPO_ROOT / "demo" / "backbones"
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
# Widths and vocabularies of the model cards: Qwen2.5-0.5B with 6 of its 24 layers and a small encoder, so a step takes
# seconds on a CPU; Qwen2.5-1.5B; Qwen2.5-7B. Weights are random, because their values change neither time nor memory.
SHAPES: dict[str, dict[str, dict]] = {
    "half-b": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
        "language": {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 6,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "so400m-1.5b": {
        "vision": SO400M,
        "language": {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "qwen-7b": {
        "vision": SO400M,
        "language": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    },
}
# depth of the model card: the layers of the language model then take most of a step, as in practice
SHAPES["half-b-24"] = SHAPES["half-b"] | {"language": SHAPES["half-b"]["language"] | {"num_hidden_layers": 24}}
NEEDS_CUDA = {"so400m-1.5b", "qwen-7b"}
LORA = {"r": 16, "alpha": 32}
TEXT_TOKENS = 80  # tokens of question, answer and prompt text
ANSWER_TOKENS = 40  # supervised tokens of these, including the end token
Losses = list[Callable[[], torch.Tensor]]  # one function per micro-batch of a step; the loss of the step is their sum


def write_backbones(folder: Path, shape: str) -> Path:
    """Write random weights with the demo's tokenizer and preprocessor; for `tiny`, return the demo's folder."""
    if shape == "tiny":
        return DEMO
    torch.manual_seed(0)
    device = "cuda" if shape in NEEDS_CUDA and torch.cuda.is_available() else "cpu"  # for speed alone
    with torch.device(device):
        settings = SiglipVisionConfig(image_size=384, patch_size=14, **SHAPES[shape]["vision"])
        SiglipVisionModel(settings).to(torch.bfloat16).save_pretrained(folder / "siglip")
        language = Qwen2Config(**SHAPES[shape]["language"])
        Qwen2ForCausalLM._from_config(language, dtype=torch.bfloat16).save_pretrained(folder / "qwen")
    for part, pattern in (("siglip", "preprocessor_config.json"), ("qwen", "*token*"), ("qwen", "merges.txt")):
        for file in (DEMO / part).glob(pattern):
            (folder / part / file.name).write_bytes(file.read_bytes())
    return folder


def build(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[MMultiModal, ImageCaptionDataset]:
    """Build our model and a data set of `photos` × `questions` questions on random pictures."""
    model = build_model(backbones, options, options.dropout)
    return model, build_dataset(model, options.photos, questions)


def build_model(
    backbones: Path, options: argparse.Namespace, dropout: float = 0.0, quantization: str = "none"
) -> MMultiModal:
    """Build our model with new LoRA and projector weights."""
    config = parse_config(
        {
            "visual": {"path": str(backbones / "siglip"), "feature": "last"},  # what every version's LLaVA computes
            "llm": {
                "path": str(backbones / "qwen"),
                "lora": LORA | {"dropout": dropout},
                "quantization": quantization,
            },
            "train": {"precision": options.precision},
        },
        "benchmark",
    )
    return MMultiModal.from_config(config, device=options.device)


def build_dataset(
    model: MMultiModal,
    num_photos: int,
    questions: int,
    text_tokens: int = TEXT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    max_questions: int = 1,
) -> ImageCaptionDataset:
    """Build `questions` questions of equal length on each of `num_photos` random pictures."""
    pixels = torch.randn(num_photos, 1, 3, *model.encoder.size, generator=torch.Generator().manual_seed(0))
    photos = {ID: Photo(ID, str(ID), str(ID), Path()) for ID in range(num_photos)}
    chat = model.processor.chat

    def entry(ID: int, number: int) -> Entry:
        """Make a question that has `text_tokens` tokens with its answer, for any tokenizer."""
        words, filler = 1, 0
        while True:
            question = f"<|extra_0|>\nQuestion {number}" + " a" * filler
            answer = ("b " * words).strip()
            ids, labels = chat.render([chat.question(question, 1), chat.answer(answer)])
            if sum(label != IGNORE_INDEX for label in labels) < answer_tokens:
                words += 1
            elif len(ids) < chat.plan.crop_tokens + text_tokens:
                filler += 1
            else:
                return Entry("b", "b", (Turn(question, (answer,), images=(ID,)),))

    entries = [entry(ID, number) for number in range(questions) for ID in photos]
    return ImageCaptionDataset(
        photos, entries, chat, lambda photo, epoch: pixels[photo.ID], max_length=16384, max_questions=max_questions
    )


def padded_batches(dataset: ImageCaptionDataset, options: argparse.Namespace) -> list[dict]:
    """Make micro-batches of `photos` questions in the usual form: right-padded rows with one photo each."""
    batches = []
    for start in range(0, len(dataset), options.photos):
        samples = [checked(dataset[index]) for index in range(start, min(start + options.photos, len(dataset)))]
        rows = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        columns = [
            {"input_ids": s.input_ids, "labels": s.labels, "attention_mask": torch.ones_like(s.input_ids)}
            for s in samples
        ]
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([column[name] for column in columns], True, value)
            for name, value in rows.items()
        }
        batch["pixel_values"] = torch.cat([crops for sample in samples for crops in sample.photos.values()])
        batches.append({name: value.to(options.device) for name, value in batch.items()})
    return batches


def as_batch(samples: list[Sample | str]) -> Batch:
    """Collate samples; no sample may be an error message."""
    batch = collate(samples)
    assert isinstance(batch, Batch), batch
    return batch


def supervised_count(dataset: ImageCaptionDataset) -> int:
    return sum(int((dataset.tokens(index).labels != IGNORE_INDEX).sum()) for index in range(len(dataset)))


def our_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    model, dataset = build(backbones, options, questions)
    packed = ImageCaptionDataset(
        dataset.photos, dataset.entries, model.processor.chat, dataset.load_photo, max_questions=questions
    )
    return _ours(model, packed, len(packed), supervised_count(dataset), options)


def unpacked_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    model, dataset = build(backbones, options, questions)
    return _ours(model, dataset, options.photos, supervised_count(dataset), options)


def _ours(
    model: MMultiModal, dataset: ImageCaptionDataset, size: int, count: int, options: argparse.Namespace
) -> tuple[torch.nn.Module, Losses]:
    if options.checkpointing:
        set_activation_checkpointing(model.language_model, True)
    if options.compile:
        compile_layers(model.language_model)
    model.train()
    batches = [
        as_batch([dataset[index] for index in range(start, min(start + size, len(dataset)))]).to(options.device)
        for start in range(0, len(dataset), size)
    ]

    return model, [lambda batch=batch: model.loss(batch, count) for batch in batches]


def naive_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    model, dataset = build(backbones, options, questions)
    if options.checkpointing:
        set_activation_checkpointing(model.language_model, True)
    model.train()
    count = supervised_count(dataset)

    def loss_of(batch: dict) -> torch.Tensor:
        logits = model(batch["pixel_values"], batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        targets = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / count

    return model, [lambda batch=batch: loss_of(batch) for batch in padded_batches(dataset, options)]


def as_llava(model: MMultiModal, language_model: torch.nn.Module, device: str) -> LlavaForConditionalGeneration:
    """Load the weights of our model, with `language_model` in place of one with LoRA, into transformers' class."""
    vision_config = SiglipVisionConfig(**model.encoder.config.to_dict())
    vision_config.tie_last_hidden_states = False
    text_config = Qwen2Config(**language_model.config.to_dict())
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=model.processor.chat.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(config, dtype=language_model.dtype).requires_grad_(False)
    llava.model.vision_tower.load_state_dict(model.encoder.state_dict())
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    llava.model.multi_modal_projector.load_state_dict(model.feature_proj.llava_tensors())
    return llava


def llava_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    """Transformers' class with the same weights; LoRA on the language model, trained projector, all logits."""
    model, dataset = build(backbones, options, questions)
    count, batches = supervised_count(dataset), padded_batches(dataset, options)
    llava = as_llava(model, model.LLM.unload(), options.device)
    llava.model.multi_modal_projector.float()
    del model, dataset
    linear = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    lora = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=options.dropout,
        target_modules=rf".*language_model.*\.({linear})",
        bias="none",
    )
    if options.checkpointing:
        set_activation_checkpointing(llava, True)
    llava = get_peft_model(llava, lora).train()
    for parameter in llava.get_base_model().model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)  # peft froze it
    return llava, [lambda batch=batch: llava(**batch, num_items_in_batch=count).loss for batch in batches]


def liger_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    from liger_kernel.transformers import apply_liger_kernel_to_llava, apply_liger_kernel_to_qwen2  # needs Triton

    apply_liger_kernel_to_qwen2(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    apply_liger_kernel_to_llava(fused_linear_cross_entropy=True)
    return llava_step(backbones, options, questions)


def peft_lora_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    model, losses = our_step(backbones, options, questions)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = PeftLinear
    return model, losses


def whole_last_layer_step(
    backbones: Path, options: argparse.Namespace, questions: int
) -> tuple[torch.nn.Module, Losses]:
    model, losses = our_step(backbones, options, questions)
    states = model.language_model.packed_states
    model.language_model.packed_states = lambda *given: states(*given[:-1])[given[-1]]
    return model, losses


def whole_layers_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    model, losses = our_step(backbones, options, questions)
    model.language_model.whole_layers = True
    return model, losses


SIDES = {
    "ours": our_step,
    "unpacked": unpacked_step,
    "llava": llava_step,
    "liger": liger_step,
    "naive": naive_step,
    "peft_lora": peft_lora_step,
    "whole_last_layer": whole_last_layer_step,
    "whole_layers": whole_layers_step,
}
DEFAULT_SIDES = ["ours", "unpacked", "llava", "liger", "naive"]
