"""How long the way is from a script to what it is for, beside what the READMEs say.

Rule. The script's `main` is called, and at the points named below the call stack is read. A hop is a call on the stack
from one function of ours to another; the files of the way are those of all these functions; its lines are all lines of
these files. What lies beside the way (config, checks, log) is not on a stack at these points and does not count.
"""

import re
import sys
from pathlib import Path

import pytest

import predict
import train
from model.model import MMultiModal
from paths import REPO_ROOT
from qwen.chat import ChatFormat
from visual.transform import ImageTransform

MOST_HOPS, MOST_FILES, MOST_LINES = 9, 6, 1500
MOST_ANSWERING_FILES = 10


class ReachedError(Exception):
    pass


def functions_of_ours():
    """(file, function) on the call stack, from the outermost; comprehensions and lambdas belong to their function."""
    frame, found = sys._getframe(), []
    while frame := frame.f_back:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(REPO_ROOT) and not name.startswith("<"):
            relative = path.relative_to(REPO_ROOT).as_posix()
            if not relative.startswith((".", "tests/")):
                found.append((relative, name))
    return found[::-1]


@pytest.fixture
def watch(monkeypatch):
    """`watch(place, "name")`: the stack at each call of that function, by its name; `stop`: the first call ends all."""
    stacks = {}

    def install(place, name, stop=False):
        inner = getattr(place, name)

        def noting(*arguments, **keywords):
            stacks[name] = [*functions_of_ours(), (inner.__code__.co_filename, name)]
            if stop:
                raise ReachedError
            return inner(*arguments, **keywords)

        monkeypatch.setattr(place, name, noting)
        return stacks

    return install


def relative(file):
    return Path(file).relative_to(REPO_ROOT).as_posix() if Path(file).is_absolute() else file


def files_of(stacks):
    return {relative(file) for stack in stacks.values() for file, _ in stack}


def lines_of(stacks):
    return sum((REPO_ROOT / file).read_text(encoding="utf-8").count("\n") for file in files_of(stacks))


@pytest.fixture
def to_the_loss(configure, tmp_path, watch):
    """The stacks where the prompt of a sample is rendered and where the loss of its batch is computed."""
    import qwen.Mqwen

    watch(ChatFormat, "render")
    stacks = watch(qwen.Mqwen, "supervised_loss", stop=True)
    config = tmp_path / "config.json"
    config.write_text(configure(workers=0, trackers=[]).model_dump_json())
    with pytest.raises(ReachedError):
        train.main(["--config", str(config)])
    return stacks


def test_the_way_to_the_loss_is_short(to_the_loss):
    for name, stack in to_the_loss.items():
        assert stack[0] == ("train.py", "main"), name
        assert len(stack) - 1 <= MOST_HOPS, stack
    files = files_of(to_the_loss)
    assert len(files) <= MOST_FILES, files
    assert lines_of(to_the_loss) <= MOST_LINES


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("", r"(\d+) hops, (\w+) files, fewer than ([\d,]+) lines"),
        ("_zh", r"(\d+) 次调用、(\w)个文件、不到 ([\d,]+) 行"),
    ],
)
def test_the_readme_names_and_counts_it(to_the_loss, language, sentence):
    text = (REPO_ROOT / f"README{language}.md").read_text(encoding="utf-8")
    named = re.findall(r"[\w/]+\.py", re.search(r"^    train\.py →.*\n +→.*$", text, re.MULTILINE)[0])
    assert set(named) == files_of(to_the_loss)
    hops, count, most_lines = re.search(sentence, text).groups()
    assert 0 < int(most_lines.replace(",", "")) - lines_of(to_the_loss) <= 100
    assert int(hops) == max(len(stack) - 1 for stack in to_the_loss.values())
    assert {"six": 6, "六": 6, "five": 5, "五": 5}[count] == len(named)
    assert re.search(rf"\[({count} files|{count}个文件)\]", text), "the list at the top of the README counts them too"


def test_the_way_to_an_answer_is_short(tiny_checkpoint, workshop, watch, monkeypatch):
    import model.model

    for place, name in (
        (model.model, "load_encoder"),
        (model.model, "load_language_model"),
        (ChatFormat, "render"),
        (ImageTransform, "crops"),
        (MMultiModal, "decode"),
    ):
        stacks = watch(place, name)
    photo = str(next((workshop / "photos").iterdir()))
    arguments = ["--checkpoint", str(tiny_checkpoint), "--image", photo, "--question", "What?"]
    predict.main([*arguments, f"model_root={workshop}"])
    assert len(stacks) == 5
    assert len(files_of(stacks)) <= MOST_ANSWERING_FILES, files_of(stacks)
