"""The table in docs/carrying.md of what can be exported is what the code does."""

import json
import re

import pytest
import torch

from benchmarks.export_matrix import PROGRAMS
from errors import UserError
from exporting import llava, vipllava
from exporting.targets import TARGETS
from paths import REPO_ROOT
from tests.tiny import write_clip, write_siglip
from tests.visual.test_vit import write as write_tower

CONVERT = {"llava": llava.convert, "vipllava": vipllava.convert}
# formats that are written as they are, up to llama.cpp's GELU
NOT_CONVERTED = {"onnx": "exact", "openvino": "exact", "gguf": "near"}
WORDS = {"no": "否", "exact": "精确", "near": "接近", "folded": "折叠"}
CONSUMERS = REPO_ROOT / "benchmarks" / "consumers"
MATRIX = REPO_ROOT / "benchmarks" / "results" / "export_matrix.json"
PAGES = ["docs/carrying.md", "docs/carrying_zh.md"]
ROW = re.compile(
    r"^\| (?P<encoder>SigLIP|CLIP|ViT|DINOv2)(?:, (?P<settings>`[^|]+`))? \| (?P<cells>.+) \|$", re.MULTILINE
)


def rows(page):
    """Encoder, settings → words of each format; `no` stands for a refusal."""
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    return {
        (row["encoder"], tuple(re.findall(r"`([^`]+)`", row["settings"] or ""))): row["cells"].split(" | ")
        for row in ROW.finditer(text)
    }


def test_both_languages_have_the_same_rows():
    first, second = map(rows, PAGES)
    assert len(first) > 10
    assert first.keys() == second.keys()
    for row, cells in first.items():
        assert [WORDS[cell] for cell in cells] == second[row], row


def test_the_table_names_every_format():
    for page in PAGES:
        for target in TARGETS:
            assert f"`--format {target}`" in (REPO_ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", rows(PAGES[0]), ids=str)
def test_a_row(make, tmp_path, row):
    encoder, settings = row
    writers = {"SigLIP": write_siglip, "CLIP": write_clip}
    folder = tmp_path / "encoder"
    if encoder in writers:
        writers[encoder](folder)
    else:
        write_tower(folder, encoder.lower())
    sections = {"visual": {"path": str(folder), "drop": "first"}}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        if key == "train.parts.vision.mode":
            sections["parts"] = {"vision": {"mode": value, "lr": 1e-3}}
        else:
            sections.setdefault(section, {})[name] = int(value) if value.isdigit() else value
    if sections.get("projector"):
        sections["projector"] |= {"heads": 4} if sections["projector"]["kind"] == "resampler" else {}
    model = make(**sections)
    cells = dict(zip(TARGETS, rows(PAGES[0])[row], strict=True))
    graphs_only = cells["llava"] == "no" and cells["onnx"] != "no"
    way_out = "use --format onnx or openvino" if graphs_only else r"(train|use|export).+"
    for target, cell in cells.items():
        if cell == "no":
            with pytest.raises(UserError, match=way_out):
                TARGETS[target].check(model)
            continue
        TARGETS[target].check(model)
        if target not in CONVERT:  # test_graphs.py and test_gguf.py measure it
            assert cell == NOT_CONVERTED[target], target
            continue
        assert cell in ("folded", "exact")
        stock = CONVERT[target](model, torch.rand(1, 3, *model.encoder.size))
        assert (stock.feature_error > 0) == (cell == "folded")


def measured_lines():
    """A line of the table of programs for each row of the committed matrix."""
    for row in json.loads(MATRIX.read_text(encoding="utf-8"))["rows"]:
        assert row["problems"] == []
        package, version = next(iter(row["versions"].items()))
        numbers = [f"{row[key]:.0e}" if key in row else "–" for key in ("features", "logits")]
        if "losses" in row:
            same = f"{row['losses'][0]:.2f} → {row['losses'][-1]:.2f}"
        else:
            same = f"{row['same answers']}/{row['questions']}"
        head = f"| `{row['program']}` | {package} {version} | {row['date']} | `{row['format']}`"
        yield f"{head} | {same} | {' | '.join(numbers)} |"


@pytest.mark.parametrize("page", PAGES)
def test_the_environment_of_every_program_is_told(page):
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    told = re.findall(r"^\| ([^|]+) \| `([^|`]+\.txt)` \|$", text, re.MULTILINE)
    assert PROGRAMS.keys() <= {name for cell, _ in told for name in re.findall(r"`([^`]+)`", cell)}
    files = {name for _, cell in told for name in cell.split(" -r ")}
    assert {str(file.relative_to(REPO_ROOT)) for file in CONSUMERS.glob("*.txt")} <= files
    for name in files:
        lines = (REPO_ROOT / name).read_text(encoding="utf-8").splitlines()
        assert all(line.startswith("#") or "==" in line for line in lines), name


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_programs_is_the_measured_one(page):
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    lines = list(measured_lines())
    assert [line for line in lines if line not in text] == []
    assert sum(line.startswith("| `") and " → " not in line for line in lines) >= 8
