"""A first and a second question about a photo: time to the first token and tokens per second, beside transformers.

    python -m benchmarks.answer --shape tiny                     # the demo's backbones
    python -m benchmarks.answer --shape half-b --output benchmarks/results/answer_half-b.json

Both sides run in one process with the same random weights, photo and prompts, greedily, and take turns `--runs` times.
`ours` is `Answerer.stream`, with an engine that has not seen the photo. `transformers` is `generate` of its
`LlavaForConditionalGeneration`. Both begin with the decoded photo and the text, and go on for `--tokens` tokens; no
token ends an answer. Before any time counts, both must give the same text.

The language model has no LoRA, since LLaVA's would need to be merged or to run in peft.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from answering.answer import Answerer
from benchmarks.report import write_report
from benchmarks.train_sides import NEEDS_CUDA, SHAPES, as_llava, write_backbones
from config import Generate, parse_config
from model.model import MMultiModal

QUESTIONS = ("What is in the picture?", "How many objects are there, and which colour has the largest of them?")
SIDE_PIXELS = 384


class Times(NamedTuple):
    """Seconds to the first token, and tokens per second after it."""

    first_token: float
    rate: float


class Clock(BaseStreamer):
    """Notes when transformers' `generate` hands out the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def build_models(shape: str, precision: str, device: str) -> tuple[MMultiModal, LlavaForConditionalGeneration]:
    """Build our model with random weights, no LoRA and no end of an answer, and LLaVA with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        backbones = write_backbones(Path(folder), shape)
        sections = {
            "visual": {"path": str(backbones / "siglip"), "feature": "last"},  # what every version's LLaVA computes
            "llm": {"path": str(backbones / "qwen")},
            "train": {"precision": precision, "parts": {"llm": {"mode": "frozen"}}},
        }
        model = MMultiModal.from_config(parse_config(sections, "benchmark"), device=device).eval()
    # the projector's small initial weights would make all photos alike, so a photo that is not read would not show
    with torch.no_grad():
        for parameter in model.feature_proj.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator(parameter.device).manual_seed(0))
    model.processor.chat.stop_ids = set()
    return model, as_llava(model, model.language_model, device).eval()


def picture(number: int) -> Image.Image:
    """Return random pixels."""
    shape = (SIDE_PIXELS, SIDE_PIXELS, 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def inputs(model: MMultiModal, photo: Image.Image, question: str) -> dict[str, torch.Tensor]:
    """Inputs of transformers' `generate`, made as our engine makes them."""
    plan = model.processor.plan(*photo.size)
    ids, _ = model.processor.chat.render([model.processor.chat.typed_question(question, [plan])])
    input_ids = torch.tensor([ids], device=model.device)
    pixels = model.processor.pixels(photo, plan).to(model.device, model.encoder.dtype)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def ours(model: MMultiModal, photo: Image.Image, tokens: int) -> list[Times]:
    answerer, settings, found = Answerer(model), Generate(max_new_tokens=tokens), []
    for question in QUESTIONS:
        began = time.perf_counter()
        reply = answerer.stream(photo, [{"role": "user", "content": question}], settings).rest()
        rest = time.perf_counter() - began - reply.seconds_to_first_token
        found.append(Times(reply.seconds_to_first_token, (tokens - 1) / rest))
    return found


def theirs(model: MMultiModal, llava: LlavaForConditionalGeneration, photo: Image.Image, tokens: int) -> list[Times]:
    found = []
    for question in QUESTIONS:
        clock, began = Clock(), time.perf_counter()
        given = inputs(model, photo, question)
        new = llava.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=None, streamer=clock)
        model.processor.tokenizer.decode(new[0, given["input_ids"].shape[1] :])
        ended = time.perf_counter()
        found.append(Times(clock.times[1] - began, (tokens - 1) / (ended - clock.times[1])))
    return found


def same_texts(model: MMultiModal, llava: LlavaForConditionalGeneration, tokens: int) -> bool:
    """Whether both sides answer the same, given that LLaVA may not use the ids that ours excludes."""
    photo, answerer, texts = picture(0), Answerer(model), []
    excluded = {"suppress_tokens": model.suppressed_ids, "eos_token_id": None}
    for question in QUESTIONS:
        given = inputs(model, photo, question)
        new = llava.generate(**given, max_new_tokens=tokens, do_sample=False, **excluded)
        text = model.processor.tokenizer.decode(
            new[0, given["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        texts.append(text == answerer.answer(photo, question, Generate(max_new_tokens=tokens)))
    return all(texts)


def measure(model: MMultiModal, llava: LlavaForConditionalGeneration, tokens: int, runs: int) -> dict:
    """Let the sides take turns; return medians of each side, and medians of the ratios of pairs."""
    sides: dict[str, Callable[[Image.Image], list[Times]]] = {
        "ours": lambda photo: ours(model, photo, tokens),
        "transformers": lambda photo: theirs(model, llava, photo, tokens),
    }
    found: dict[str, list[list[Times]]] = {side: [] for side in sides}
    for answer in sides.values():  # warms up, and is not timed
        answer(picture(0))
    for run in range(runs):
        for side, answer in sides.items():
            found[side].append(answer(picture(run + 1)))

    def median(side: str, value: Callable[[list[Times]], float], digits: int) -> float:
        return round(statistics.median(map(value, found[side])), digits)

    def ratio(value: Callable[[list[Times], list[Times]], float]) -> float:
        return round(statistics.median(map(value, found["ours"], found["transformers"])), 2)

    return {
        "sides": {
            side: {
                "first_question_seconds": median(side, lambda times: times[0].first_token, 4),
                "second_question_seconds": median(side, lambda times: times[1].first_token, 4),
                "tokens_per_second": median(side, lambda times: statistics.mean(one.rate for one in times), 2),
            }
            for side in sides
        },
        "first_token_of_first_question_times_sooner": ratio(
            lambda our, their: their[0].first_token / our[0].first_token
        ),
        "first_token_of_second_question_times_sooner": ratio(
            lambda our, their: their[1].first_token / our[1].first_token
        ),
        "second_question_times_sooner_than_first": ratio(lambda our, _: our[0].first_token / our[1].first_token),
        "decoding_times_faster": ratio(
            lambda our, their: sum(one.rate for one in our) / sum(one.rate for one in their)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="widths of the model (default tiny)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default 32)")
    parser.add_argument("--runs", type=int, default=5, help="of each side, each with a new photo (default 5)")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="default auto")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape in NEEDS_CUDA and device != "cuda":
        parser.error(f"--shape {options.shape} needs a GPU")
    model, llava = build_models(options.shape, options.precision, device)
    same = same_texts(model, llava, min(options.tokens, 8))
    if not same and model.LLM.dtype == torch.float32:
        raise SystemExit("error: the sides answer differently, so their times would say nothing")
    report = {
        "shape": options.shape,
        "tokens": options.tokens,
        "runs": options.runs,
        "prompt_tokens": inputs(model, picture(0), QUESTIONS[0])["input_ids"].shape[1],
        "same_texts": same,
        **measure(model, llava, options.tokens, options.runs),
        "dtype": str(model.LLM.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_report(report, options.output)


if __name__ == "__main__":
    main()
