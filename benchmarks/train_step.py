"""One optimizer step of ours beside other ways to train: time, memory, ratios.

    python -m benchmarks.train_step --shape tiny|half-b|half-b-24|so400m-1.5b|qwen-7b --questions 1 2 5

and `--output FILE.json` to keep the figures.

Sides, all with the same weights, photos, questions, LoRA, precision, checkpointing and AdamW:

* `ours`: the questions of a photo in one sequence, `lm_head` on supervised positions.
* `unpacked`: ours with every question as a sample of its own.
* `llava`: transformers' `LlavaForConditionalGeneration` with peft, in a plain loop in place of `transformers.Trainer`,
  which adds its own work to a step but cannot be stopped after each to let the others have their turn.
* `liger`: the same with Liger's fused linear cross-entropy, where it can be imported (it needs Triton, so a GPU).
* `peft_lora`, `whole_last_layer`, `whole_layers`: ours with peft's own LoRA layers, with a last layer that computes all
  positions, and with transformers' own layers in place of `qwen/lean.py` (so all positions too): what these parts of
  our code are worth. Not among the default sides.
* `naive`: the loop of the report's ancestor: every question with its own copy of the photo, logits of all positions in
  float32.

Each side runs in a process of its own, and they take turns step by step, so that a noisy machine hits all. Their first
losses must agree before any time counts. Sides other than `ours` read their questions in micro-batches of `--photos`:
all logits of all questions would not fit into most memories.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
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
from model.model import DTYPES, MMultiModal, pick_precision
from paths import REPO_ROOT
from qwen.chat import IGNORE_INDEX
from qwen.lora import LoraLinear
from training.batches import checked
from training.build import compile_layers
from training.costs import peak_memory

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
    device = "cuda" if shape in NEEDS_CUDA else "cpu"
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


def build_model(backbones: Path, options: argparse.Namespace, dropout: float = 0.0) -> MMultiModal:
    """Build our model with new LoRA and projector weights."""
    config = parse_config(
        {
            "visual": {"path": str(backbones / "siglip")},
            "llm": {"path": str(backbones / "qwen"), "lora": LORA | {"dropout": dropout}},
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


def llava_step(backbones: Path, options: argparse.Namespace, questions: int) -> tuple[torch.nn.Module, Losses]:
    """Load the same weights into transformers' class; LoRA on the language model, trained projector, all logits."""
    model, dataset = build(backbones, options, questions)
    count, batches = supervised_count(dataset), padded_batches(dataset, options)
    vision_config = SiglipVisionConfig(**model.encoder.config.to_dict())
    vision_config.tie_last_hidden_states = True  # otherwise LLaVA omits SigLIP's post layer norm
    language_model = model.LLM.unload()
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
    with torch.device(options.device):
        llava = LlavaForConditionalGeneration._from_config(config, dtype=language_model.dtype).requires_grad_(False)
    llava.model.vision_tower.load_state_dict(model.encoder.state_dict())
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    projector = llava.model.multi_modal_projector
    projector.load_state_dict(model.feature_proj.llava_tensors())
    projector.float()
    del model, language_model, dataset
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


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process since `reset_peak`: of the GPU, else resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert peak is not None, "/proc/self/status tells no VmHWM"
        return int(peak[1]) * 1024
    return peak_memory(torch.device(device))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":  # on other systems, the peak includes loading
        Path("/proc/self/clear_refs").write_text("5")


def work(side: str, backbones: Path, options: argparse.Namespace, questions: int, pipe) -> None:
    """Run a side in a separate process: one optimizer step per request; send the peak memory at the end."""
    torch.set_num_threads(options.threads)
    before = 0 if options.device == "cuda" else peak_bytes("cpu")  # Python and its libraries
    model, losses = SIDES[side](backbones, options, questions)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    dtype = DTYPES[options.precision]
    reset_peak(options.device)
    pipe.send("ready")
    while pipe.recv() == "step":
        began = time.perf_counter()
        total = 0.0
        for loss_of in losses:
            with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
                loss = loss_of()
            loss.backward()
            total += loss.item()  # waits for the GPU
            del loss
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        pipe.send((total, time.perf_counter() - began))
    pipe.send(peak_bytes(options.device) - before)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, *given) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, *given, theirs))
        self.process.start()
        theirs.close()  # else the pipe stays open when the process dies
        self.receive()  # load one side after another, to limit memory

    def ask(self, request: str):
        self.pipe.send(request)
        return self.receive()

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(
                f"error: side '{self.name}' ended with exit code {self.process.exitcode} (-9: the system ran out of "
                "memory): compare fewer sides at once, or a smaller shape"
            ) from None

    def stop(self) -> int:
        """End the process; return its peak memory."""
        peak = self.ask("stop")
        self.process.join()
        return peak


def measure_memory(side: str, backbones: Path, options: argparse.Namespace, questions: int) -> int:
    """Measure the peak bytes of two steps of a side, in a process that returns freed memory at once.

    By default, glibc keeps freed blocks of up to 32 MiB. On a CPU they are up to a third of the peak, and the amount
    varies. Returning memory takes time, so another process measures the time of the steps.
    """
    glibc = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    os.environ.update(glibc)
    running = Side(side, backbones, options, questions)
    for name in glibc:
        del os.environ[name]
    for _ in range(2):  # the second step starts with the optimizer state
        running.ask("step")
    return running.stop()


def measure(backbones: Path, options: argparse.Namespace, questions: int) -> dict:
    """Measure losses, seconds per step and peak memory of all sides, and the ratios to ours."""
    sides = [Side(name, backbones, options, questions) for name in options.sides]
    seconds: dict[str, list[float]] = {side: [] for side in options.sides}
    first_loss = {}
    for turn in range(options.pairs + 1):
        for side in sides:
            loss, elapsed = side.ask("step")
            print(f"{questions} questions, step {turn}, {side.name}: {elapsed:.1f} s", file=sys.stderr, flush=True)
            if turn == 0:  # warm-up
                first_loss[side.name] = loss
            else:
                seconds[side.name].append(elapsed)
        if turn == 0:
            tolerance = 1e-4 if options.precision == "float32" else 2e-2
            if max(first_loss.values()) - min(first_loss.values()) > tolerance * abs(first_loss["ours"]):
                raise SystemExit(f"error: the sides do not compute the same loss: {first_loss}")
    for side in sides:
        side.stop()
    memory = {side: measure_memory(side, backbones, options, questions) for side in options.sides}
    others = [side for side in options.sides if side != "ours"]
    return {
        "questions_per_photo": questions,
        "first_loss": first_loss,
        "seconds": {side: round(statistics.median(values), 4) for side, values in seconds.items()},
        "memory_mib": {side: round(value / 2**20) for side, value in memory.items()},
        "times_faster_than": {
            side: round(statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side], strict=True)), 2)
            for side in others
        },
        "share_of_memory_of": {side: round(memory["ours"] / memory[side], 2) for side in others},
    }


def why_no_liger(device: str) -> str | None:
    """Return the reason why the side `liger` cannot run here, or None."""
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None if device == "cuda" else "Triton kernels need a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="widths of the model (default tiny)")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 5], help="per photo (default 1 2 5)")
    parser.add_argument("--photos", type=int, default=2, help="of a micro-batch (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side that count (default 5)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=DEFAULT_SIDES)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="default auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile for our layers")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on all sides")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA's inputs, on all sides (default 0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default all)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape in NEEDS_CUDA and options.device != "cuda":
        raise SystemExit(f"error: shape {options.shape} needs a CUDA GPU; --shape half-b runs on a CPU")
    options.precision = pick_precision(options.precision, torch.device(options.device))
    options.sides = ["ours", *(side for side in options.sides if side != "ours")]
    skipped = {}
    reason = why_no_liger(options.device)
    if "liger" in options.sides and reason is not None:
        options.sides.remove("liger")
        skipped["liger"] = reason
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), options.shape)
        results = []
        for questions in options.questions:
            results.append(measure(backbones, options, questions))
            print(json.dumps(results[-1], indent=2), flush=True)
    report = {
        "shape": options.shape,
        "precision": options.precision,
        "photos": options.photos,
        "text_tokens_per_question": TEXT_TOKENS,
        "supervised_tokens_per_question": ANSWER_TOKENS,
        "checkpointing": options.checkpointing,
        "lora_dropout": options.dropout,
        "compiled": options.compile,
        "threads": options.threads,
        "machine": torch.cuda.get_device_name()
        if options.device == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "skipped": skipped,
        "results": results,
    }
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
