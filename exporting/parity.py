"""Compare our model with its exported folder on photos and questions. Called by `write.py`.

Our outputs are stored before the export changes the model. `stock_check.py` then computes the same with the library
that reads the folder, in a process of its own.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from config import IMAGE_TAG
from dataset.records import Photo, read_records, split_entries
from errors import UserError
from exporting.stock_check import CANNOT_WRITE
from exporting.template import PLACEHOLDER
from model.model import MMultiModal
from paths import resolve_path
from qwen.chat import Message
from visual.transform import load_image

REAL_CASES = 4  # questions of the run's own validation set
LONGEST_ANSWER = 32  # tokens of a compared answer
# Largest allowed (relative error of the projected features, logit difference in standard deviations of our logits).
# In float32 an exact format differs only by the order of sums. In 16 bits both sides round at every layer, each with
# its own kernels, and the differences grow with the square root of the depth. The limits are several times what six
# layers of Qwen2.5-0.5B behind SigLIP-base differ by; `export_report.json` has the figures of each export. Weights of
# 8 bits have a precision near bfloat16's, and get its limits. Those of 4 bits change logits by more, and
# their limit refuses a wrong file only: a vocabulary whose rows are shifted, as a test shows.
BFLOAT16 = (5e-2, 0.5)
TOLERANCES: dict[torch.dtype | str, tuple[float, float]] = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (1e-2, 0.1),
    torch.bfloat16: BFLOAT16,
    "q8_0": BFLOAT16,
    "int8": BFLOAT16,
    "int4": (BFLOAT16[0], 2.0),
    "q4_k_m": (BFLOAT16[0], 2.0),
}
FOLDED = (2e-3, 0.05)  # in float32, for a folded layer norm
LOWEST = -80.0  # logarithm of a probability; a program that gives probabilities cannot tell smaller ones from 0
LARGEST_PIXEL_DIFFERENCE = 0.02  # of normalised pixels: 2.5 of 255 levels, as libraries resize differently


@dataclass
class Case:
    """A dialogue whose last question is answered.

    Attributes:
        photos: RGB, in reading order.
        messages: for our prompt format.
        stock_messages: the same for a chat template.
    """

    photos: list[Image.Image]
    messages: list[Message]
    stock_messages: list[dict[str, Any]]


@dataclass
class Reference:
    """Our outputs.

    Attributes:
        folder: of the files for `stock_check.py`, and of ours.
        dtype: of the computation.
        pixels: (C, 3, H, W) of all photos.
        texts: our answers.
        source: where the photos come from, for the report.
    """

    folder: Path
    dtype: torch.dtype
    pixels: torch.Tensor
    source: str
    texts: list[str] = field(default_factory=list)


def store_reference(model: MMultiModal, folder: Path, photos_first: bool = False) -> Reference:
    """Compute our outputs on the run's validation photos, or on drawn ones, and store them in `folder`.

    Args:
        photos_first: the program puts photos before the text, so questions with a photo elsewhere are left out.
    """
    chat, settings = model.processor.chat, model.config.generate
    cases = _real_cases(model, photos_first)
    source = "photos and questions of the validation set, and drawn ones" if cases else "drawn photos"
    cases += _drawn_cases(model)
    tensors, rows, pixels_of = {}, [], {}
    reference = Reference(folder, model.encoder.dtype, torch.empty(0), source)
    penalty: dict[str, Any] = (
        {} if settings.repetition_penalty == 1 else {"repetition_penalty": settings.repetition_penalty}
    )
    longest = min(settings.max_new_tokens, LONGEST_ANSWER)
    for number, case in enumerate(cases):
        ids = torch.tensor([chat.render(case.messages)[0]])
        pixels = torch.stack([model.processor.transform(photo) for photo in case.photos]) if case.photos else None
        with torch.no_grad():
            tokens = model.generate(pixels, ids, max_new_tokens=longest, do_sample=False, **penalty)
            logits = model(pixels, torch.cat([ids, tokens], 1), logits_to_keep=tokens.shape[1] + 1).logits[0]
            if pixels is not None:
                pixels_of[f"{number}.pixels"] = pixels
                tensors[f"{number}.features"] = model.project(model.encode_image(pixels)).float()
        tensors[f"{number}.logits"] = logits.float()
        names = [f"{number}-{index}.png" for index in range(len(case.photos))]
        for name, photo in zip(names, case.photos, strict=True):
            photo.save(folder / name)
        row = {"photos": names, "messages": case.stock_messages, "ids": ids[0].tolist(), "tokens": tokens[0].tolist()}
        rows.append(row | {"max_new_tokens": longest})
        reference.texts.append(model.processor.tokenizer.decode(tokens[0], skip_special_tokens=True))
    reference.pixels = torch.cat(list(pixels_of.values()))
    save_file(pixels_of, folder / "pixels.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "reference.safetensors")
    (folder / "cases.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return reference


def compare(
    reference: Reference,
    folder: Path,
    program: str,
    feature_error: float = 0.0,
    python: str = sys.executable,
    weights: str = "",
) -> dict[str, Any]:
    """Load `folder` in a fresh process and return the report; `problems` is empty if all agrees.

    Args:
        program: that reads the folder, a key of `stock_check.READERS`.
        feature_error: that the conversion itself makes, 0 for an exact format.
        python: interpreter whose libraries are used.
        weights: type of quantised ones, or empty.

    Raises:
        OSError: the disk is full; the folder may be good.
    """
    done = _computed(reference, folder, program, python)
    limits = TOLERANCES[weights or reference.dtype]
    if feature_error:
        limits = (max(limits[0], FOLDED[0]), max(limits[1], FOLDED[1]))
    report: dict[str, Any] = {
        "dtype": str(reference.dtype).removeprefix("torch."),
        "photos": reference.source,
        "weights": weights or str(reference.dtype).removeprefix("torch."),
        "error of the conversion": feature_error,
        "allowed": {"features": limits[0], "logits": limits[1], "pixels": LARGEST_PIXEL_DIFFERENCE},
    }
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return report | {"problems": [f"{program} cannot load or run it: {last}"], "stderr": done.stderr[-4000:]}
    theirs = json.loads((reference.folder / "theirs.json").read_text(encoding="utf-8"))
    questions = json.loads((reference.folder / "cases.json").read_text(encoding="utf-8"))
    problems = [f"{kind}: {', '.join(names[:3])}" for kind, names in theirs["tensors"].items()]
    files = {name: load_file(reference.folder / f"{name}.safetensors") for name in ("pixels", "reference", "theirs")}
    if theirs["log_probabilities"]:  # their smallest are 0 as probabilities
        for file in (files["reference"], files["theirs"]):
            for name in [name for name in file if name.endswith(".logits")]:
                file[name] = torch.log_softmax(file[name], -1).clamp_min(LOWEST)
    cases = []
    for number, (question, text) in enumerate(zip(questions, reference.texts, strict=True)):
        case = _differences(files, number, question, theirs["cases"][number])
        if theirs["log_probabilities"]:  # those of later tokens are not known, but may differ as much as allowed
            case["tie"] = limits[1] * case["logit_std"]
        problems += [f"question {number + 1}: {problem}" for problem in _problems(case, limits)]
        asked = question["messages"][-1]["content"]
        asked = asked if isinstance(asked, str) else asked[-1]["text"]
        answers = {"ours": text, "theirs": theirs["cases"][number]["text"], "same": case.pop("margin") is None}
        cases.append({"question": asked, **answers, **case})
    return report | {"versions": theirs["versions"], "problems": problems, "questions": cases}


def _computed(reference: Reference, folder: Path, program: str, python: str) -> subprocess.CompletedProcess[str]:
    """Let `stock_check.py` write a program's outputs on `folder`; a program that fails is no exception."""
    script = Path(__file__).with_name("stock_check.py")
    done = subprocess.run(
        [python, "-P", str(script), program, str(folder), str(reference.folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == CANNOT_WRITE:
        raise OSError(None, f"the comparison could not write its figures ({done.stderr.strip().splitlines()[-1]})")
    if done.returncode == -9:  # SIGKILL, which says nothing about the folder
        raise UserError(
            "the comparing process was killed, which the system does when memory runs out: close other programs, or "
            "take --dtype bfloat16 (nothing is kept)"
        )
    return done


def _differences(
    files: dict[str, dict[str, torch.Tensor]], number: int, question: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """Return the differences of one case; without photos it has no pixels and features."""
    pixels, ours, outputs = files.values()
    case: dict[str, Any] = {"ids_equal": theirs["ids"] == question["ids"]}
    if question["photos"]:
        difference = outputs[f"{number}.pixels"] - pixels[f"{number}.pixels"]
        case["pixels"] = float(difference.abs().max())
        if f"{number}.features" in outputs:
            features = ours[f"{number}.features"]
            difference = outputs[f"{number}.features"].reshape(features.shape) - features
            case["features"] = float(difference.norm() / features.norm())
    logits, rows = ours[f"{number}.logits"], outputs[f"{number}.logits"]  # (N, V), and (N, V) or the first of them
    case["logits"] = float((rows - logits[: len(rows)]).abs().max())
    case["logit_std"] = float(logits.std())
    case["margin"] = margin(question["tokens"], theirs["tokens"], logits)
    return case


def margin(ours: list[int], theirs: list[int], logits: torch.Tensor) -> float | None:
    """Return by how much we preferred our token where the answers first differ; None for equal answers."""
    for position, (our_token, their_token) in enumerate(zip(ours, theirs, strict=False)):
        if our_token != their_token:
            return float(logits[position, our_token] - logits[position, their_token])
    return None if len(ours) == len(theirs) else float("inf")


def _problems(case: dict[str, Any], limits: tuple[float, float]) -> list[str]:
    """Sentences on what differs more than allowed. Comparisons are written so that NaN fails."""
    problems, (features, logits), tie = [], limits, 2 * case.pop("tie", case["logits"])
    if not case["ids_equal"]:
        problems.append("its prompt has other token ids")
    if not case.get("pixels", 0.0) <= LARGEST_PIXEL_DIFFERENCE:
        problems.append(f"its pixels differ by {case['pixels']:.1e} (allowed {LARGEST_PIXEL_DIFFERENCE})")
    if not case.get("features", 0.0) <= features:
        problems.append(f"the features differ by {case['features']:.1e} (allowed {features})")
    relative = case["logits"] / case["logit_std"] if case["logit_std"] else math.inf
    if not relative <= logits:
        problems.append(f"the logits differ by {relative:.1e} standard deviations (allowed {logits})")
    # where both rate two tokens equal up to the difference of the logits, either may come first
    if case["margin"] is not None and not case["margin"] <= tie:
        problems.append("the greedy answer is another")
    return problems


def _real_cases(model: MMultiModal, photos_first: bool) -> list[Case]:
    """Questions of the run's validation set, as far as its files are on this machine."""
    data, cases = model.config.data, []
    files = [resolve_path(data.image_map), resolve_path(data.captions)]
    if not all(file.is_file() for file in files):
        return []
    try:
        photos, entries = read_records(*files)
        _, val = split_entries(photos, entries, data.val_fraction)
        for entry in val:
            turn = entry.turns[0]
            text = turn.question.replace(IMAGE_TAG, PLACEHOLDER)
            if not turn.images or "<|" in text or text.count(PLACEHOLDER) != len(turn.images):
                continue
            if photos_first and (len(turn.images) > 1 or not text.startswith(f"{PLACEHOLDER}\n")):
                continue
            if len(cases) == REAL_CASES:
                break
            pictures = [_picture(photos[ID]) for ID in turn.images]
            message = model.processor.chat.question(turn.question, len(turn.images))
            cases.append(Case(pictures, [message], [{"role": "user", "content": text}]))
    except (UserError, OSError):  # data that have changed since the training are no reason not to export
        return cases
    return cases


def _picture(photo: Photo) -> Image.Image:
    return load_image(photo.picture)


def _drawn_cases(model: MMultiModal) -> list[Case]:
    """A question in English, one in Chinese, one without a photo, one on two photos after an answered one."""
    chat = model.processor.chat
    image = {"type": "image"}
    drawn = [_drawing((640, 480), "red"), _drawing((300, 400), "blue")]

    def asked(text: str, photos: int) -> dict[str, Any]:
        return {"role": "user", "content": [image] * photos + [{"type": "text", "text": text}]}

    def case(*texts: str, photos: int) -> Case:
        ours, stock = [chat.typed_question(texts[0], photos)], [asked(texts[0], photos)]
        for answer, question in zip(texts[1::2], texts[2::2], strict=True):
            ours += [chat.answer(answer), chat.typed_question(question, 0)]
            stock += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return Case(drawn[:photos], ours, stock)

    return [
        case("What is in the picture?", photos=1),
        case("图中有什么？", photos=1),
        case("Hello!", photos=0),
        case("What has changed?", "The colour.", "Which colour is it now?", photos=2),
    ]


def _drawing(size: tuple[int, int], colour: str) -> Image.Image:
    photo = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(photo)
    draw.ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=colour)
    draw.rectangle((size[0] // 2, size[1] // 2, size[0] - 20, size[1] - 20), outline="green", width=8)
    return photo
