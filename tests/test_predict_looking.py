"""The command line's `--box` and `--heatmap`: what they show the model, draw and refuse."""

import shutil

import numpy as np
import pytest
from PIL import Image

import predict
from answering.answer import Answerer
from answering.heatmap import answer_words
from config import Generate
from errors import UserError
from model.checkpoint import load_checkpoint
from visual.region import Region

QUESTION = "What is it?"


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def answerer(tiny_checkpoint):
    return Answerer(load_checkpoint(tiny_checkpoint, overrides={"model_root": str(tiny_checkpoint.parent.parent)}))


def run(checkpoint, folder, *options):
    root = f"model_root={checkpoint.parent.parent}"
    photo = ["--image", str(folder / "photo.png"), "--question", QUESTION]
    predict.main(["--checkpoint", str(checkpoint), *photo, *options, root, "generate.max_new_tokens=8"])


@pytest.mark.parametrize(("text", "box"), [("10,5,40,30", (10, 5, 40, 30)), ("0.5,0,1,1", (30, 0, 60, 40))])
def test_a_box_is_asked_about_beside_its_photo(tiny_checkpoint, folder, answerer, capsys, text, box):
    run(tiny_checkpoint, folder, "--box", text)
    photos = [folder / "photo.png", Region(folder / "photo.png", box)]
    messages = [{"role": "user", "content": QUESTION, "images": photos}]
    assert capsys.readouterr().out == answerer.stream(None, messages, Generate(max_new_tokens=8)).rest().text + "\n"


def test_a_heatmap_of_photo_and_box_is_drawn(tiny_checkpoint, folder, answerer):
    drawn = folder / "drawn.png"
    run(tiny_checkpoint, folder, "--heatmap", str(drawn))
    assert Image.open(drawn).size == (60, 40)
    first = drawn.read_bytes()
    for options in (["--heatmap-word", answer_word(answerer, folder)], ["--heatmap-method", "attention"]):
        run(tiny_checkpoint, folder, "--heatmap", str(drawn), *options)
        assert drawn.read_bytes() != first
    attention, layers = drawn.read_bytes(), ["--heatmap-method", "attention", "--heatmap-layers"]
    run(tiny_checkpoint, folder, "--heatmap", str(drawn), *layers, "1")
    one_layer = drawn.read_bytes()
    run(tiny_checkpoint, folder, "--heatmap", str(drawn), *layers, "1,0")  # the tiny model has two
    assert attention == drawn.read_bytes() != one_layer
    with pytest.raises(UserError, match=r"layers \[7\]: the language model has the layers 0 to 1"):
        run(tiny_checkpoint, folder, "--heatmap", str(drawn), *layers, "7")
    run(tiny_checkpoint, folder, "--heatmap", str(drawn), "--box", "0,0,20,40")
    assert Image.open(drawn).size == (60 + 8 + 20, 40)


def answer_word(answerer, folder):
    messages = [{"role": "user", "content": QUESTION, "images": [folder / "photo.png"]}]
    answer = answerer.stream(None, messages, Generate(max_new_tokens=8)).rest().text
    words = answer_words(answerer.model, answer)
    return words[-1].text if words else answer[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--box", "10,5,40"], "the box '10,5,40' is not x0,y0,x1,y1"),
        (["--box", "10,5,70,30"], "the box 10,5,70,30 ends outside the photo of 60×40 pixels"),
        (["--box", "10,5,10,30"], "the box 10,5,10,30 is empty"),
        (["--heatmap-word", "red"], "--heatmap-word belongs to --heatmap"),
        (["--heatmap-layers", "1"], "--heatmap-layers belongs to --heatmap FILE.png"),
        (["--heatmap-method", "gradient"], "--heatmap-method belongs to --heatmap FILE.png"),
        (["--heatmap", "x.png", "--heatmap-layers", "1"], "--heatmap-layers belongs to --heatmap-method attention"),
        (["--heatmap", "no such folder/x.png"], "the folder of --heatmap does not exist"),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(folder, monkeypatch, options, problem):
    monkeypatch.setattr("model.checkpoint.load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=problem):
        run(folder / "run" / "checkpoint", folder, *options)


def test_the_photo_is_not_overwritten(folder, monkeypatch):
    shutil.copy(folder / "photo.png", folder / "copy.png")
    with pytest.raises(UserError, match="--heatmap would overwrite the photo"):
        run(folder / "run" / "checkpoint", folder, "--heatmap", str(folder / "photo.png"))
    assert (folder / "photo.png").read_bytes() == (folder / "copy.png").read_bytes()


@pytest.mark.parametrize("option", ["--box=1,2,3,4", "--heatmap=x.png"])
def test_a_file_of_questions_names_its_own_boxes(folder, option):
    (folder / "in.jsonl").write_text("{}")
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    with pytest.raises(UserError, match=f"{option.partition('=')[0]} belongs to a photo"):
        predict.main(["--checkpoint", "x", *files, option])
