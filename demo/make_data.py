"""Write the demo's photos and raw annotations in the two source formats, as a person would download them.

    python -m demo.make_data --output data/demo --photos 2000 --seed 0

gives two sources for training, each with its own photos, one that only the evaluation uses, and one of boxes, which
nothing here reads (docs/looking.md says how to train on it):

    llava/annotations.json          llava/photos/*.jpg          LLaVA style, questions in both languages on each photo
    ai_challenger/annotations.json  ai_challenger/photos/*.jpg  AI Challenger style, five Chinese captions of each
    paraphrases/annotations.json    paraphrases/photos/*.jpg    LLaVA style, held-out wordings (`demo/paraphrases.py`)
    regions/annotations.json        llava/photos/*.jpg          LLaVA style, questions about boxes in some of them

`process_image.py` reads them next. Every row also carries `"type"`, the kind of question, for the scores by type; those
of Chinese questions end in `_zh`.

With `--small`, each picture fills one quarter of a photo twice as wide and high, so that an encoder that sees the whole
photo sees everything at half its size; questions that name a place are left out, and so are paraphrases and boxes.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from demo.asking import Row, dialogue, paraphrases, questions
from demo.regions import object_box, region_questions
from demo.world import PICTURE_PX, Scene, captions, draw, random_scene
from paths import REPO_ROOT

CAPTION_SHARE = 0.2  # share of the photos with captions; the others have questions
UNKNOWN_SHARE = 0.25  # share of the other photos with a question that the world has no answer to
PARAPHRASE_PHOTOS = 20  # each held-out wording is asked twice
REGION_SHARE = 1 / 3  # share of the photos with questions that have questions about a boxed object too


def make_data(output: Path, photos: int, seed: int, per_type: int = 1, small: bool = False) -> tuple[int, int]:
    """Write photos and annotations under `output`; return the numbers of rows of the two sources for training.

    The same arguments give the same files, byte for byte.

    Args:
        per_type: questions of each type and language on a photo; descriptions and questions without an answer, whose
            answers are long, are in one language only.
    """
    rng = np.random.default_rng(seed)
    captioned = 0 if small else round(photos * CAPTION_SHARE)
    caption_rows, question_rows, region_rows = [], [], []
    for number in range(photos):
        scene = random_scene(rng)
        if number < captioned:
            name = hashlib.sha1(f"{seed}-{number}".encode()).hexdigest() + ".jpg"  # as in AI Challenger
            _save(scene, output / "ai_challenger" / "photos" / name, rng)
            caption_rows.append({"url": "", "image_id": name, "caption": captions(scene), "type": "caption"})
        else:
            name = f"{number:012d}.jpg"
            _save(scene, output / "llava" / "photos" / name, rng, small)
            asked = _one_language(questions(scene, rng, per_type, places=not small), rng)
            question_rows += [_row(name, kind, [(kind, question, answer)]) for kind, question, answer in asked]
            if not small:
                question_rows.append(_row(name, "dialogue", dialogue(scene, rng)))
                region_rows += _region_rows(name, scene, np.random.default_rng([seed, 2, number]))
    if caption_rows:
        _write(output / "ai_challenger" / "annotations.json", caption_rows)
    _write(output / "llava" / "annotations.json", question_rows)
    if not small:
        _write(output / "paraphrases" / "annotations.json", _paraphrases(output / "paraphrases" / "photos", seed))
        _write(output / "regions" / "annotations.json", region_rows)
    return len(caption_rows), len(question_rows)


def _one_language(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Keep one description, and of `UNKNOWN_SHARE` one question without an answer, each in a random language."""
    suffix = {"description": str(rng.choice(["", "_zh"])), "unknown": str(rng.choice(["", "_zh"]))}
    if rng.random() >= UNKNOWN_SHARE:
        suffix["unknown"] = "left out"
    kept = [kind + end for kind, end in suffix.items()]
    return [row for row in rows if row[0] in kept or row[0].removesuffix("_zh") not in suffix]


def _paraphrases(folder: Path, seed: int) -> list[dict]:
    """Draw the photos of the held-out wordings and return their rows; their scenes are drawn apart from the others."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for number in range(PARAPHRASE_PHOTOS):
        scene = random_scene(rng)
        name = f"{number:012d}.jpg"
        _save(scene, folder / name, rng)
        rows += [_row(name, row[0], [row]) for row in paraphrases(scene, rng, number)]
    return rows


def _region_rows(name: str, scene: Scene, rng: np.random.Generator) -> list[dict]:
    """Make the rows of one boxed object, or none; all rows of a photo have the same box, so they share a sequence."""
    if rng.random() >= REGION_SHARE:
        return []
    thing = scene[int(rng.integers(len(scene)))]
    box = object_box(thing, rng)
    return [_row(name, row[0], [row]) | {"box": box} for row in region_questions(thing, rng)]


def _row(name: str, kind: str, turns: list[Row]) -> dict:
    """Make a row in LLaVA's form; the photo comes before the first question."""
    messages = []
    for _, question, answer in turns:
        tag = "" if messages else "<image>\n"
        messages += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return {"id": name.removesuffix(".jpg"), "image": name, "conversations": messages, "type": kind}


def _save(scene: Scene, file: Path, rng: np.random.Generator, small: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = draw(scene, rng)
    if small:
        photo = Image.new("RGB", (2 * PICTURE_PX, 2 * PICTURE_PX))
        own = int(rng.integers(4))
        for quarter in range(4):
            corner = (quarter % 2 * PICTURE_PX, quarter // 2 * PICTURE_PX)
            photo.paste(picture if quarter == own else draw((), rng), corner)
        picture = photo
    picture.save(file, quality=92)


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "data" / "demo", help="folder (default data/demo)")
    parser.add_argument("--photos", type=int, default=2000, help="number of photos for training (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, pictures and questions (default 0)")
    parser.add_argument("--small", action="store_true", help="each picture in a quarter of a photo")
    arguments = parser.parse_args()
    caption_rows, question_rows = make_data(arguments.output, arguments.photos, arguments.seed, small=arguments.small)
    print(f"{arguments.photos} photos, {caption_rows} caption rows, {question_rows} questions in {arguments.output}")


if __name__ == "__main__":
    main()
