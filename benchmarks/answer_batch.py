"""Questions answered together beside the same questions one by one: seconds, ratio.

    python -m benchmarks.answer_batch                            # the demo's questions, its backbones, untrained
    python -m benchmarks.answer_batch --checkpoint DIR           # a trained checkpoint and the questions of its config
    python -m benchmarks.answer_batch --shape light              # random weights of the widths below

and `--output FILE.json` to keep the figures.

Both sides run in one process, on the same model and requests in float32, and take turns `--runs` times: `one_by_one` is
`Answerer.stream_messages`, which keeps the photo's keys for the next question, and `together` is
`Answerer.answer_many`. They must give the same texts.

An untrained model ends its answers at random. So without a checkpoint, no token ends an answer, and every answer has
`--tokens` tokens. The default for the demo is the mean of the true answers, end token included.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from answering.answer import Answerer
from answering.request import Reply, Request
from benchmarks.report import write_report
from config import Generate, load_config, parse_config
from dataset.records import read_records, split_entries, write_records
from demo.make_data import make_data
from evaluation.runner import turn_request
from model.checkpoint import load_checkpoint
from model.model import MMultiModal
from paths import REPO_ROOT, resolve_path
from process_image import process_sources

DEMO = REPO_ROOT / "demo" / "backbones"
DEMO_TOKENS = 4
# A ViT of 224 px with patches of 16 px and ViT-Ti's widths (Touvron et al. 2021, arXiv 2012.12877), and a language
# model with SmolLM2-135M's (its config.json). Weights are random, because their values do not change the time.
VISION = {"image_size": 224, "patch_size": 16, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12,
          "num_attention_heads": 3}  # fmt: skip
LANGUAGE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip


def demo_requests(folder: Path, photos: int) -> tuple[MMultiModal, list[Request]]:
    """Draw a demo world in `folder`; return the untrained demo model and the questions on all photos."""
    make_data(folder, photos, seed=0)
    names = {"captions": ("ai_challenger", "ai_challenger"), "questions": ("llava", "llava")}
    sources = [
        {"name": name, "format": kind, "annotations": str(folder / place / "annotations.json"),
         "images": str(folder / place / "photos")}
        for name, (kind, place) in names.items()
    ]  # fmt: skip
    image_map, captions = folder / "image_map.json", folder / "captions.json"
    files = {"data.image_map": str(image_map), "data.captions": str(captions)}
    config = load_config("configs/demo.yaml", {"data.sources": sources, **files})
    write_records(*process_sources(config.data)[:2], image_map, captions)
    model = MMultiModal.from_config(config, device="cpu", dtype=torch.float32).eval()
    return model, data_requests(model, "all")


def data_requests(model: MMultiModal, split: str) -> list[Request]:
    """The questions of the model's data, in the order of an evaluation."""
    data = model.config.data
    photos, entries = read_records(resolve_path(data.image_map), resolve_path(data.captions))
    if split == "val":
        entries = split_entries(photos, entries, data.val_fraction)[1]
    entries = sorted(entries, key=lambda entry: entry.images)
    chat = model.processor.chat
    return [
        turn_request(entry, number, [photos[ID].path for ID in entry.images], chat)
        for entry in entries
        for number in range(len(entry.turns))
    ]


def light_requests(folder: Path, photos: int, questions: int) -> tuple[MMultiModal, list[Request]]:
    """Write random backbones and photos to `folder`; return the model and `questions` questions on each photo."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder / "siglip")
    Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)).save_pretrained(folder / "qwen")
    for file in (*(DEMO / "qwen").glob("*token*"), DEMO / "qwen" / "merges.txt"):
        (folder / "qwen" / file.name).write_bytes(file.read_bytes())
    processor = (DEMO / "siglip" / "preprocessor_config.json").read_text(encoding="utf-8").replace(": 384", ": 224")
    (folder / "siglip" / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    sections = {"visual": {"path": str(folder / "siglip")}, "llm": {"path": str(folder / "qwen")}}
    model = MMultiModal.from_config(parse_config(sections, "benchmark"), device="cpu", dtype=torch.float32).eval()
    pixels, requests = np.random.default_rng(0), []
    for photo in range(photos):
        file = folder / f"{photo}.png"
        Image.fromarray(pixels.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file)
        for number in range(questions):
            question = model.processor.chat.typed_question(f"What is the colour of object {number} in this photo?", 1)
            requests.append(Request([file], [question]))
    return model, requests


def one_by_one(model: MMultiModal, requests: list[Request], settings: Generate) -> list[str]:
    answerer = Answerer(model)
    return [answerer.stream_messages(*request, settings).rest().text for request in requests]


def together(model: MMultiModal, requests: list[Request], settings: Generate) -> list[str]:
    replies = Answerer(model).answer_many(requests, settings)
    return [reply.text if isinstance(reply, Reply) else str(reply) for reply in replies]


SIDES: dict[str, Callable[[MMultiModal, list[Request], Generate], list[str]]] = {
    "one_by_one": one_by_one,
    "together": together,
}


def measure(model: MMultiModal, requests: list[Request], settings: Generate, runs: int) -> dict:
    """Let the sides take turns; return their median seconds, and the median and extremes of the ratios of pairs."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    texts = {}
    for answer in SIDES.values():  # warms up, and is not timed
        answer(model, requests[: len(requests) // 8 + 1], settings)
    for _ in range(runs):
        for side, answer in SIDES.items():
            start = time.perf_counter()
            texts[side] = answer(model, requests, settings)
            seconds[side].append(time.perf_counter() - start)
    same = sum(map(str.__eq__, *texts.values()))
    ratios = [alone / joint for alone, joint in zip(*seconds.values(), strict=True)]
    return {
        "questions": len(requests),
        "photos": len({tuple(request.photos) for request in requests if request.photos}),
        "same_texts": same,
        "seconds": {side: round(statistics.median(times), 2) for side, times in seconds.items()},
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_of_runs": [round(ratio, 2) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "light"], default="demo", help="default demo")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="ask this checkpoint its validation questions")
    parser.add_argument("--photos", type=int, help="default 54, as in results/answer_batch_demo.json; light: 16")
    parser.add_argument("--questions", type=int, default=4, help="per photo, with --shape light (default 4)")
    parser.add_argument("--tokens", type=int, help="of each answer, without a checkpoint (default 4; light: 16)")
    parser.add_argument("--runs", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    light = options.shape == "light"
    with tempfile.TemporaryDirectory() as name:
        if options.checkpoint is not None:
            model = load_checkpoint(options.checkpoint.absolute(), device="cpu", dtype=torch.float32)
            requests, settings = data_requests(model, "val"), model.config.generate
        else:
            if light:
                model, requests = light_requests(Path(name), options.photos or 16, options.questions)
            else:
                model, requests = demo_requests(Path(name), options.photos or 54)
            model.processor.chat.stop_ids = set()
            settings = Generate(max_new_tokens=options.tokens or (16 if light else DEMO_TOKENS))
        figures = measure(model, requests, settings, options.runs)
    report = {
        "model": options.checkpoint.name if options.checkpoint is not None else options.shape,
        "tokens_of_an_answer": "as the model ends it" if options.checkpoint is not None else settings.max_new_tokens,
        **figures,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    write_report(report, options.output)


if __name__ == "__main__":
    main()
