"""A small world of photos and raw annotation files for the tests of `process_image.py`."""

import json

import yaml
from PIL import Image

import process_image
from dataset.records import read_records


def llava(image, question, answer):
    speech = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": speech}


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


class World:
    """Six photos in two folders, three annotation files and their config; Chinese and spaces in the paths."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "输出 data"
        self.photos = folder / "照片 one", folder / "train2017"
        for index, photos in enumerate(self.photos):
            photos.mkdir()
            for number in range(3):
                Image.new("RGB", (30, 20), (90 * index, 60 * number, 50)).save(photos / f"{number}.jpg")
        self.annotations = {
            "ali": write_json(
                folder / "ali.json", [{"image_id": f"{n}.jpg", "caption": [f"第{n}张", "一张照片"]} for n in range(3)]
            ),
            "reasoning": write_json(
                folder / "reasoning.json", [llava(f"{n}.jpg", f"why {n}?", f"r{n}") for n in (0, 1, 0)]
            ),
            "detail": write_json(folder / "detail.json", [llava(f"{n}.jpg", f"what {n}?", f"d{n}") for n in (2, 0)]),
        }
        self.data = {
            "sources": [
                self.source("ali", "ai_challenger", self.photos[0]),
                self.source("reasoning", "llava", self.photos[1]),
                self.source("detail", "llava", self.photos[1]),
            ],
            "image_map": str(self.output / "image_map.json"),
            "captions": str(self.output / "captions.json"),
            "max_rejected": 1,  # in six rows each is a large share
        }
        self.config = folder / "config.yaml"
        self.write_config()

    def source(self, name, kind, images):
        return {"name": name, "format": kind, "annotations": str(self.annotations[name]), "images": str(images)}

    def write_config(self):
        config = {"data": self.data, "visual": {"path": "none"}, "llm": {"path": "none"}}
        self.config.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    def run(self, *arguments):
        process_image.main(["--config", str(self.config), *arguments])

    def read(self):
        return read_records(self.output / "image_map.json", self.output / "captions.json")

    def written(self):
        return {path.name: path.read_bytes() for path in self.output.iterdir()} if self.output.exists() else {}

    def rejected(self):
        """(source, file, place, reason, row) of each line of rejected.jsonl."""
        lines = map(json.loads, (self.output / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
        return [tuple(line[key] for key in ("source", "file", "place", "reason", "row")) for line in lines]

    def table(self, capsys):
        """{source: [rows read, rows kept, new photos, questions, tags added]} from the printed table."""
        lines = capsys.readouterr().out.splitlines()
        return {
            line.split()[0]: [int(number) for number in line.split()[1:6]]
            for line in lines[1 : len(self.data["sources"]) + 2]
        }
