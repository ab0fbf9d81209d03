"""`process_image.py` on annotation files of the real sizes, beside a plain `json` loop: seconds and peak memory.

    python -m benchmarks.preprocess [--runs 3] [--share 1.0] [--output FILE.json]

Draws the three files of the full run (210,000 AI Challenger rows with five captions; 76,643 and 23,240 LLaVA rows on
COCO names, many of them in both), then runs each side in processes of its own, in turns. Photos are not looked at
(`data.check_images=none`): none exist here.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from benchmarks.report import write_report
from paths import REPO_ROOT

# rows of caption_train_annotations_20170902.json, complex_reasoning_77k.json and detail_23k.json
AI_CHALLENGER_ROWS, REASONING_ROWS, DETAIL_ROWS = 210_000, 76_643, 23_240
COCO_PHOTOS = 118_287  # of train2017
# lengths as in the public files: captions of about 20 characters, answers of about 120 and 110 words
CHINESE_WORDS = "一个 穿着 白色 衣服 的 男人 站在 绿色 草地 上 女人 拿着 手机 道路 宽阔 两个 孩子 舞台 唱歌".split()  # noqa: SIM905
ENGLISH_WORDS = "the image shows a person near several objects which suggests that they might be outside".split()  # noqa: SIM905

# same work as the report's script: read every file whole, build both dictionaries, write them without checks
PLAIN_LOOP = """
import json, random, sys
image_map, captions = {}, {}
for path, prefix in zip(sys.argv[1:4], ("ai/", "train2017/", "train2017/")):
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    for row in rows:
        name = prefix + (row["image_id"] if "image_id" in row else row["image"])
        if name not in image_map:
            image_map[name] = {"ID": len(image_map), "image_file": name.split("/")[1], "path": name}
        if "caption" in row:
            entry = {"q": random.choice(["What?<|extra_0|>", "<|extra_0|>What?"]), "a": row["caption"]}
        else:
            human, gpt = row["conversations"][:2]
            entry = {"q": human["value"].replace("<image>", "<|extra_0|>"), "a": [gpt["value"]]}
        captions.setdefault(str(image_map[name]["ID"]), []).append(entry)
for path, content in ((sys.argv[4], image_map), (sys.argv[5], captions)):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
"""


def write_annotations(folder: Path, share: float) -> list[Path]:
    """Write the three annotation files with `share` of their rows, row by row to keep this process small."""
    draw = random.Random(0)

    def text(words: Sequence[str], count: int, space: str) -> str:
        return space.join(draw.choices(words, k=count))

    def ai_challenger() -> Iterator[dict]:
        for _ in range(round(AI_CHALLENGER_ROWS * share)):
            name = f"{draw.getrandbits(160):040x}"
            captions = [text(CHINESE_WORDS, 10, "") for _ in range(5)]
            yield {"url": f"http://img5.cache.netease.com/{name}.jpg", "image_id": f"{name}.jpg", "caption": captions}

    def llava(rows: int, words: int) -> Iterator[dict]:
        for _ in range(round(rows * share)):
            name = f"{draw.randrange(COCO_PHOTOS):012}"
            question = {"from": "human", "value": text(ENGLISH_WORDS, 14, " ") + "?\n<image>"}
            answer = {"from": "gpt", "value": text(ENGLISH_WORDS, words, " ") + "."}
            yield {"id": name, "image": f"{name}.jpg", "conversations": [question, answer]}

    rows = {
        "ali.json": ai_challenger(),
        "reasoning.json": llava(REASONING_ROWS, 120),
        "detail.json": llava(DETAIL_ROWS, 110),
    }
    for name, drawn in rows.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            for number, row in enumerate(drawn):
                file.write(("[" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
            file.write("]")
    return [folder / name for name in rows]


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command that must succeed; return its seconds and peak MiB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: exit status {process.returncode} of {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a quick look (default 1.0)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if not hasattr(os, "wait4"):
        raise SystemExit("error: peak memory of a process is measured with os.wait4, which Windows has not: use WSL")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_annotations(folder, options.share)
        sources = [
            {"name": file.stem, "format": kind, "annotations": str(file), "images": str(folder / images)}
            for file, kind, images in zip(
                files, ("ai_challenger", "llava", "llava"), ("ai", "train2017", "train2017"), strict=True
            )
        ]
        outputs = {
            "image_map": str(folder / "ours" / "image_map.json"),
            "captions": str(folder / "ours" / "captions.json"),
        }
        config = {
            "data": {"sources": sources, "check_images": "none", **outputs},
            "visual": {"path": "-"},
            "llm": {"path": "-"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        plain_outputs = [str(folder / "plain_image_map.json"), str(folder / "plain_captions.json")]
        commands = {
            "process_image.py": [sys.executable, "process_image.py", "--config", str(folder / "config.yaml")],
            "plain json loop": [sys.executable, "-c", PLAIN_LOOP, *map(str, files), *plain_outputs],
        }
        figures: dict[str, list[tuple[float, float]]] = {side: [] for side in commands}
        for _ in range(options.runs):
            for side, command in commands.items():
                figures[side].append(measure(command))
        photos = {len(json.loads(Path(path).read_bytes())) for path in (outputs["image_map"], plain_outputs[0])}
        if len(photos) != 1:
            raise SystemExit(f"error: the two sides do not see the same photos: {photos}")
        result = {
            "rows": sum(round(rows * options.share) for rows in (AI_CHALLENGER_ROWS, REASONING_ROWS, DETAIL_ROWS)),
            "photos": photos.pop(),
            "annotations_mib": round(sum(file.stat().st_size for file in files) / 2**20),
            "runs": options.runs,
            "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "seconds": {side: round(statistics.median(s for s, _ in runs), 2) for side, runs in figures.items()},
            "peak_memory_mib": {side: round(max(memory for _, memory in runs)) for side, runs in figures.items()},
        }
    write_report(result, options.output)


if __name__ == "__main__":
    main()
