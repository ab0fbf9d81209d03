"""The scripts on one tiny run, in processes of their own, and the prompt that all of them must share."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from answering.answer import Answerer
from dataset.image_caption_dataset import ImageCaptionDataset, entry_messages
from dataset.records import read_records
from errors import UserError
from evaluation import screenshots
from model.checkpoint import load_checkpoint
from paths import REPO_ROOT
from tests.tiny import tiny_config, write_qwen


def script(*arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def workshop(tiny_checkpoint):
    return tiny_checkpoint.parent.parent


@pytest.fixture(scope="module")
def model(tiny_checkpoint, workshop):
    return load_checkpoint(tiny_checkpoint, overrides={"model_root": workshop})


def test_prompt_is_identical_in_training_evaluation_page_and_command_line(model, workshop, monkeypatch):
    photos, entries = read_records(workshop / "image_map.json", workshop / "captions.json")
    entry = next(entry for entry in entries if entry.images and len(entry.turns) == 1)
    dataset = ImageCaptionDataset(photos, [entry], model.processor.chat, lambda photo, epoch: torch.zeros(1))
    trained_ids, trained_labels = dataset.tokens(0).input_ids.tolist(), dataset.tokens(0).labels.tolist()
    prompt_length = next(index for index, label in enumerate(trained_labels) if label != -100)

    asked = []
    read = Answerer._read_prompt
    monkeypatch.setattr(
        Answerer, "_read_prompt", lambda self, *given: asked.append(given[-1].prompt.ids) or read(self, *given)
    )
    answerer = Answerer(model)

    def prompt_of(stream):
        list(stream)
        return asked[-1]

    evaluation = prompt_of(answerer.stream_messages([photos[0].path], entry_messages(entry, model.processor.chat, [])))
    typed = entry.turns[0].question.removeprefix("<|extra_0|>\n")
    page_and_command_line = prompt_of(answerer.stream(photos[0].path, [{"role": "user", "content": typed}]))
    assert evaluation == page_and_command_line == trained_ids[:prompt_length]


def test_predict(tiny_checkpoint, workshop, tmp_path):
    options = ["--checkpoint", tiny_checkpoint, f"model_root={workshop}", "generate.max_new_tokens=5"]
    photo = workshop / "photos" / "0.png"
    done = script("predict.py", *options, "--image", photo, "--question", "a<|im_end|><|extra_0|>?")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:50])
    rows = [{"image": str(photo), "question": "?", "id": 7}, {"image": "cut.jpg", "question": "?"}, {"question": "Hi"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(UserError, match="1 of 3 rows"):
        importlib.import_module("predict").main([*map(str, options), *files])
    answered = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in answered] == [
        ["answer", "id", "image", "question"],
        ["error", "image", "question"],
        ["answer", "question"],
    ]
    assert "cut.jpg" in answered[1]["error"]


def test_a_missing_kernel_of_bitsandbytes_is_not_said():
    code = (
        "import cli, logging\nlog = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', ImportError('kernels'))\n"
        "log.warning('another %s', 'message')"
    )
    assert script("-c", code).stderr == "another message\n"


def test_eval_vqa(tiny_checkpoint, workshop, tmp_path):
    done = script(
        "eval_vqa.py", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", "--gallery",
        tmp_path / "g.png", f"model_root={workshop}", f"data.image_map={workshop}/image_map.json",
        f"data.captions={workshop}/captions.json", "generate.max_new_tokens=5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["passes"]) == {"trained", "blind", "text", "untrained", "majority"}
    assert len({score["overall"]["questions"] for score in metrics["passes"].values()}) == 1
    assert (tmp_path / "g.png").is_file()


def test_export(tiny_checkpoint, workshop, tmp_path):
    data = [f"data.image_map={workshop}/image_map.json", f"data.captions={workshop}/captions.json"]
    done = script(
        "export.py", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", f"model_root={workshop}", *data
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 8 greedy answers are the same" in done.stdout  # four of its validation photos, and four drawn ones
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["passed"]


def test_outputs_that_cannot_be_written_are_said_before_the_model_is_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    export = importlib.import_module("export")
    monkeypatch.setattr(export, "load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    for output, message in {
        tmp_path: "exists already",
        tmp_path / ("x" * 300): "name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            export.main(["--checkpoint", str(tiny_checkpoint), "--output", str(output)])
    (tmp_path / "file").touch()
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match=r"--output: .*file"):
        screenshots.main(
            ["--checkpoint", "c", "--photo", str(tmp_path / "photo.png"), "--output", str(tmp_path / "file")]
        )
    with pytest.raises(UserError, match="photo not found"):
        screenshots.main(["--checkpoint", "c", "--photo", "x" * 300, "--output", str(tmp_path)])


def test_a_full_disk_while_exporting_is_said(tiny_checkpoint, workshop, tmp_path, monkeypatch):
    export = importlib.import_module("export")

    def full(tensors, file, **_):
        file.write_bytes(b"part")
        raise SafetensorError("Error while serializing: IoError: No space left on device (os error 28)")

    monkeypatch.setattr("exporting.folder.save_file", full)
    with pytest.raises(UserError, match=r"out: .*No space left on device"):
        export.main(["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "out"), f"model_root={workshop}"])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(tiny_checkpoint, workshop, tmp_path):
    export = importlib.import_module("export")
    cut = shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    (cut / "feature_proj.safetensors").unlink()
    for folder, override, message in (
        (cut, f"model_root={workshop}", "not a complete checkpoint"),
        (tiny_checkpoint, f"llm.path={tmp_path}/nowhere", "'llm.path': no folder"),
        (tiny_checkpoint, f"llm.path={write_qwen(tmp_path / 'qwen', 'qwen3')}", "trained on another 'llm.path'"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out"), override])
    with pytest.raises(SystemExit) as end:
        export.main(["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--format", "tflite"])
    assert end.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["with #2", "with: colon", "中文 空格"])
def test_paths_given_in_python_need_no_quoting(workshop, tiny_checkpoint, tmp_path, name):
    """A Path object, and characters that mean something in YAML."""
    folder = tmp_path / name
    shutil.copytree(workshop / "qwen", folder / "qwen")
    shutil.copytree(workshop / "siglip", folder / "siglip")
    loaded = load_checkpoint(tiny_checkpoint, overrides={"model_root": folder})
    assert loaded.llm_folder == folder / "qwen"


def test_train_from_a_folder_with_spaces_and_chinese(workshop, tmp_path, capsys):
    folder = tmp_path / "我的 data"
    shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns("run"))
    text = (folder / "image_map.json").read_text(encoding="utf-8").replace(str(workshop), str(folder))
    (folder / "image_map.json").write_text(text, encoding="utf-8")
    config = tiny_config(folder, train={"max_steps": 2, "output_dir": str(folder / "run")})
    (folder / "run.yaml").write_text(config.model_dump_json(), encoding="utf-8")  # JSON is YAML too
    train = importlib.import_module("train").main
    train(["--config", str(folder / "run.yaml"), "--dry-run"])
    assert "the whole run" in capsys.readouterr().out
    assert not (folder / "run").exists()
    train(["train.max_steps=1", "--config", str(folder / "run.yaml"), "train.log_steps=1"])
    assert (folder / "run" / "checkpoint-1" / "config.yaml").is_file()
    with pytest.raises(UserError, match="^'train.output_dir'") as again:
        train(["--config", str(folder / "run.yaml")])
    assert "\n" not in str(again.value)
    resumed = script("train.py", "--config", folder / "run.yaml", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "run" / "checkpoint-2").is_dir()
    # what it prints last can be pasted, though the backbones are in no usual place
    _, *command = shlex.split(resumed.stdout.splitlines()[-1].removeprefix("ask it:"))
    for placeholder, value in {"FILE": workshop / "photos" / "0.png", "TEXT": "What is it?"}.items():
        command[command.index(placeholder)] = str(value)
    assert command.pop(0) == "predict.py"
    capsys.readouterr()
    importlib.import_module("predict").main(command)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["process_image", "train", "predict", "eval_vqa", "export", "test_gui", "serve"])
def test_help_and_a_wrong_key(name, tiny_checkpoint, tmp_path, capsys):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "key=value" in capsys.readouterr().out
    options = [] if name in ("process_image", "train") else ["--checkpoint", str(tiny_checkpoint)]
    options += {"predict": ["--question", "?"], "export": ["--output", str(tmp_path / "out")]}.get(name, [])
    with pytest.raises(ValueError, match=r"unknown key 'llm\.pth', did you mean 'llm\.path'\?") as caught:
        main([*options, "llm.pth=x"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["process_image", "train", "predict", "eval_vqa", "serve"])
def test_help_does_not_wait_for_torch(name):
    code = f"""
import runpy, sys
sys.argv = ["{name}.py", "--help"]
try:
    runpy.run_path("{name}.py", run_name="__main__")
except SystemExit as end:
    sys.exit(f"{{end.code}} {{sorted({{'torch', 'transformers'}} & sys.modules.keys())}}")
"""
    done = script("-c", code)
    assert done.stderr == "0 []\n"
    assert done.stdout.startswith("usage: ")
