"""Write the public files of Flickr8k, Flickr8k-CN and DAQUAR in formats that process_image.py reads.

    python -m benchmarks.public_data flickr8k DOWNLOADS data/flickr8k
    python -m benchmarks.public_data daquar DOWNLOADS data/daquar

DOWNLOADS is the folder with the files as they were unpacked:
  * flickr8k: Flickr8k.token.txt, Flickr_8k.{trainImages,devImages,testImages}.txt, and flickr8kzhc.caption.txt of
    Flickr8k-CN if there is one. Results: {train,val,test}_en.json, COCO captions files, and {train,val,test}_zh.json,
    as those of AI Challenger.
  * daquar: qa.37.raw.train.txt and qa.37.raw.test.txt. Results: train.jsonl and test.jsonl, with the type of each
    question: count, colour or object.
Photos are not touched: `data.sources[].images` names their folder. docs/real_run.md has the whole run.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from cli import run_script

import orjson

from errors import UserError

SPLITS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
# as the files have it: "… in the image12 ?", "… in this image image12?"
IMAGE_NAME = re.compile(r"\s*(?:in|on|of)?\s*(?:the|this)?\s*(?:image|picture)?\s*\b(image\d+)\s*\??\s*$")


def convert_flickr8k(downloads: Path, output: Path) -> None:
    """Write the captions of each split, English ones as COCO does, Chinese ones as AI Challenger does."""
    english = _captions(downloads / "Flickr8k.token.txt", re.compile(r"(.+)#\d+\t(.+)"))
    chinese_file = downloads / "flickr8kzhc.caption.txt"
    chinese = _captions(chinese_file, re.compile(r"(.+)#zhc#\d+ (.+)")) if chinese_file.is_file() else {}
    for split, name in SPLITS.items():
        photos = [line.strip() for line in _lines(downloads / f"Flickr_8k.{name}.txt")]
        images = [{"id": number, "file_name": photo} for number, photo in enumerate(photos)]
        rows = [
            {"image_id": number, "caption": text}
            for number, photo in enumerate(photos)
            for text in english.get(photo, ())
        ]
        annotations = [{"id": number} | row for number, row in enumerate(rows)]
        _write(output / f"{split}_en.json", {"images": images, "annotations": annotations})
        if chinese:
            own = [{"image_id": photo, "caption": chinese[photo]} for photo in photos if photo in chinese]
            _write(output / f"{split}_zh.json", own)


def convert_daquar(downloads: Path, output: Path) -> None:
    """Write the questions of each split, one a line, without the name of the photo and with words apart.

    The files join words ("garbage_bin"). A language model has seen them apart, and every score takes both as equal.
    """
    for split in ("train", "test"):
        file = downloads / f"qa.37.raw.{split}.txt"
        lines = list(_lines(file))
        if len(lines) % 2:
            raise UserError(f"{file}: {len(lines)} lines, but each question has a line and each answer: get it again")
        rows = []
        for number in range(0, len(lines), 2):
            question, answer = (line.strip().replace("_", " ") for line in lines[number : number + 2])
            found = IMAGE_NAME.search(question)
            if not found:
                raise UserError(f"{file}, line {number + 1}: no image at the end of {question[:60]!r}: get it again")
            asked = question[: found.start()].strip()
            kind = "count" if "how many" in asked.lower() else "colour" if re.search("colou?r", asked) else "object"
            rows.append(
                {
                    "image": f"{found[1]}.png",
                    "question": f"{asked[:1].upper()}{asked[1:]}?",
                    "answer": answer,
                    "type": kind,
                }
            )
        _write(output / f"{split}.jsonl", rows)


def _captions(file: Path, form: re.Pattern[str]) -> dict[str, list[str]]:
    """Return the captions of each photo, from lines in which `form` finds photo and caption."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(file), 1):
        found = form.fullmatch(line.strip())
        if not found:
            raise UserError(f"{file}, line {number}: {line[:60]!r} has no photo and caption: get the file again")
        captions.setdefault(found[1], []).append(found[2].strip())
    return captions


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines that are not empty."""
    if not file.is_file():
        raise UserError(f"{file} is missing: put the unpacked files of the data set there")
    return (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def _write(file: Path, content: dict | list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = content if file.suffix == ".jsonl" and isinstance(content, list) else [content]
    file.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    print(f"written: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["flickr8k", "daquar"])
    parser.add_argument("downloads", type=Path, help="folder with the unpacked files")
    parser.add_argument("output", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    convert = convert_flickr8k if arguments.dataset == "flickr8k" else convert_daquar
    convert(arguments.downloads, arguments.output)


if __name__ == "__main__":
    run_script(main)
