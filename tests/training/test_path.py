"""What the READMEs say about the way from `train.py` to the loss, beside the files that a step really runs through."""

import re
import sys
from pathlib import Path

import pytest

import train
from paths import REPO_ROOT
from qwen.chat import ChatFormat


class LossReachedError(Exception):
    pass


def product_files_of_the_stack():
    frame, files = sys._getframe(), []
    while frame := frame.f_back:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPO_ROOT):
            files.append(path.relative_to(REPO_ROOT).as_posix())
    return {file for file in files if not file.startswith((".", "tests/"))}


@pytest.fixture
def files(configure, tmp_path, monkeypatch):
    """The files on the call stack where the first batch's prompts are rendered and where its loss is computed."""
    found = {"loss": set()}
    render = ChatFormat.render

    def rendering(chat, messages):
        found["prompt"] = product_files_of_the_stack()  # the last call before the loss is that of the loader
        return render(chat, messages)

    def loss(*_):
        found["loss"] = product_files_of_the_stack()
        raise LossReachedError

    monkeypatch.setattr(ChatFormat, "render", rendering)
    monkeypatch.setattr("qwen.Mqwen.supervised_loss", loss)
    config = tmp_path / "config.json"
    config.write_text(configure(workers=0, trackers=[]).model_dump_json())
    with pytest.raises(LossReachedError):
        train.main(["--config", str(config)])
    assert "training/loop.py" in found["prompt"] & found["loss"]
    return found["prompt"] | found["loss"] | {"qwen/chat.py"}  # which `rendering` calls


@pytest.mark.parametrize(("language", "count"), [("", "nine files"), ("_zh", "九个文件")])
def test_the_readme_names_and_counts_the_files(files, language, count):
    text = (REPO_ROOT / f"README{language}.md").read_text(encoding="utf-8")
    named = re.findall(r"[\w/]+\.py", re.search(r"^    train\.py →.*\n +→.*$", text, re.MULTILINE)[0])
    assert set(named) == files
    assert (len(named), count in text) == (9, True)
