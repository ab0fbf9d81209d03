"""One optimiser step of ours beside transformers' `LlavaForConditionalGeneration` with peft: time, memory, ratio.

    python -m benchmarks.train_step --shape demo|half-b --questions 5 --photos 2 --pairs 5 [--output FILE.json]

Both sides get the same weights, photos, questions, LoRA and precision, each in a process of its own, and take turns
step by step, so that a noisy machine hits both. Their first losses must agree before any time counts.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from config import REPO_ROOT, parse_config
from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo, Turn
from model.model import DTYPES, MMultiModal

DEMO = REPO_ROOT / "demo" / "backbones"
# so400m's picture and Qwen2.5-0.5B's widths and vocabulary (model cards), with few layers so that a step takes seconds
HALF_B_VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
HALF_B_LANGUAGE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
ANSWER_WORDS = 20


def write_half_b(folder: Path) -> None:
    """Random weights of shape `half-b` with the demo's tokenizer and preprocessor."""
    torch.manual_seed(0)
    vision = SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **HALF_B_VISION)).to(torch.bfloat16)
    vision.save_pretrained(folder / "siglip")
    Qwen2ForCausalLM(Qwen2Config(**HALF_B_LANGUAGE)).to(torch.bfloat16).save_pretrained(folder / "qwen")
    for part, pattern in (("siglip", "preprocessor_config.json"), ("qwen", "*token*"), ("qwen", "merges.txt")):
        for file in (DEMO / part).glob(pattern):
            (folder / part / file.name).write_bytes(file.read_bytes())


def build(backbones: Path, options: argparse.Namespace) -> tuple[MMultiModal, ImageCaptionDataset]:
    """Our model and a data set of `photos` × `questions` questions on random pictures."""
    config = parse_config(
        {
            "visual": {"path": str(backbones / "siglip")},
            "llm": {"path": str(backbones / "qwen"), "lora": LORA},
            "train": {"precision": options.precision},
        },
        "benchmark",
    )
    model = MMultiModal.from_config(config, device="cpu")
    size = model.encoder.config.image_size
    pixels = torch.randn(options.photos, 3, size, size, generator=torch.Generator().manual_seed(0))
    photos = {ID: Photo(ID, str(ID), str(ID), Path()) for ID in range(options.photos)}
    entries = [
        Entry((ID,), "b", "b", (Turn(f"<|extra_0|>\nQuestion {number}?", ("word " * ANSWER_WORDS,)),))
        for ID in photos
        for number in range(options.questions)
    ]
    dataset = ImageCaptionDataset(photos, entries, model.chat, lambda photo: pixels[photo.ID])
    return model, dataset


def our_step(backbones: Path, options: argparse.Namespace):
    model, dataset = build(backbones, options)
    packed = ImageCaptionDataset(
        dataset.photos, dataset.entries, model.chat, dataset.load_photo, max_questions=options.questions
    )
    batch = collate([packed[index] for index in range(len(packed))], pad_id=0)
    image = batch.pop("pixel_values")
    model.train()
    return model, lambda: model(image, **batch, supervised_only=True).loss


def llava_step(backbones: Path, options: argparse.Namespace):
    """The same weights in transformers' class; LoRA on the language model, projector trained, all logits."""
    model, dataset = build(backbones, options)
    batch = collate([dataset[index] for index in range(len(dataset))], pad_id=0)
    vision_config = SiglipVisionConfig(**model.encoder.config.to_dict())
    vision_config.tie_last_hidden_states = True  # without it, LLaVA leaves out SigLIP's post layer norm
    language_model = model.LLM.unload()
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_index=model.chat.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).to(language_model.dtype).requires_grad_(False)
    llava.model.vision_tower.load_state_dict(model.encoder.state_dict())
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    projector = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict(model.feature_proj[0].state_dict())
    projector.linear_2.load_state_dict(model.feature_proj[2].state_dict())
    projector.float().requires_grad_(True)
    del model, language_model, dataset
    linear = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    lora = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=rf".*language_model.*\.({linear})", bias="none"
    )
    llava = get_peft_model(llava, lora).train()
    for parameter in llava.get_base_model().model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)  # peft froze it
    return llava, lambda: llava(**batch).loss


SIDES = {"ours": our_step, "llava": llava_step}


def work(side: str, backbones: Path, options: argparse.Namespace, pipe) -> None:
    """A process of its own: makes one optimiser step whenever asked, and at last reports its peak memory."""
    torch.set_num_threads(options.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, loss_of = SIDES[side](backbones, options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    dtype = DTYPES[options.precision]
    while pipe.recv() == "step":
        began = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((loss.item(), time.perf_counter() - began))
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def measure(backbones: Path, options: argparse.Namespace) -> dict:
    """Losses, seconds per step and peak memory of both sides, and their ratios."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(side, backbones, options, theirs)))
        processes[-1].start()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    first_loss = {}
    for pair in range(options.pairs + 1):
        for side, pipe in pipes.items():
            pipe.send("step")
            loss, elapsed = pipe.recv()
            if pair == 0:  # warm-up
                first_loss[side] = loss
            else:
                seconds[side].append(elapsed)
        if pair == 0:
            tolerance = 1e-4 if options.precision == "float32" else 2e-2
            if abs(first_loss["ours"] - first_loss["llava"]) > tolerance * abs(first_loss["llava"]):
                raise SystemExit(f"error: the two sides do not compute the same loss: {first_loss}")
    memory = {}
    for side, pipe in pipes.items():
        pipe.send("stop")
        memory[side] = pipe.recv()
    for process in processes:
        process.join()
    median = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "shape": options.shape,
        "precision": options.precision,
        "photos": options.photos,
        "questions_per_photo": options.questions,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "first_loss": first_loss,
        "seconds": {side: round(value, 4) for side, value in median.items()},
        "memory_mib": {side: round(value / 2**20) for side, value in memory.items()},
        "times_faster": round(
            statistics.median(b / a for a, b in zip(seconds["ours"], seconds["llava"], strict=True)), 2
        ),
        "share_of_memory": round(memory["ours"] / memory["llava"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "half-b"], default="demo")
    parser.add_argument("--questions", type=int, default=5, help="per photo (default 5)")
    parser.add_argument("--photos", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side that count (default 5)")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbones = DEMO
        if options.shape == "half-b":
            backbones = Path(folder)
            write_half_b(backbones)
        result = measure(backbones, options)
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['times_faster']} times faster, {result['share_of_memory']:.0%} of the memory")


if __name__ == "__main__":
    main()
