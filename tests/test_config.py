"""Each mistake in a config is one sentence that names the key."""

import pytest

from config import key_paths, load_config, parse_config, parse_overrides
from paths import REPO_ROOT, existing_path

GOOD = {"visual": {"path": "v"}, "llm": {"path": "l"}}


def message(raw):
    with pytest.raises(ValueError, match=r"my\.yaml: ") as caught:
        parse_config(raw, "my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train": {"max_step": 3}}, "my.yaml: unknown key 'train.max_step', did you mean 'train.max_steps'?"),
        ({"max_steps": 3}, "my.yaml: unknown key 'max_steps', did you mean 'train.max_steps'?"),
        ({"train": {"zebra": 3}}, "unknown key 'train.zebra', valid here: output_dir, init_from"),
        ({"train": {"epochs": "many"}}, "'train.epochs' = 'many': Input should be a valid integer"),
        ({"train": {"projector_lr": -1}}, "'train.projector_lr' = -1: Input should be greater than 0"),
        ({"train": {"precision": "bf32"}}, "'train.precision' = 'bf32': Input should be 'auto', 'bf16'"),
        ({"visual": {}}, "key 'visual.path' is missing"),
        (
            {"data": {"sources": [{"name": "a", "format": "llava", "annotations": "b", "imgs": "c"}]}},
            "key 'data.sources.0.images' is missing; unknown key 'data.sources.0.imgs', did you mean 'images'?",
        ),
    ],
)
def test_one_sentence_per_mistake(change, expected):
    text = message(GOOD | change)
    assert expected in text.replace("'data.sources.0.images'?", "'images'?")
    assert "\n" not in text


def test_bad_combinations():
    source = {"name": "a", "format": "llava", "annotations": "b", "images": "c"}
    assert "two sources are called 'a'" in message(GOOD | {"data": {"sources": [source, source]}})
    assert "'questions' names the question file" in message(GOOD | {"data": {"sources": [source | {"questions": "q"}]}})
    assert "'questions' names" in message(GOOD | {"data": {"sources": [source | {"format": "vqav2"}]}})


def test_files_that_are_no_config(tmp_path):
    cases = {"list.yaml": ("- 1", "expected sections"), "broken.yaml": ("a: [1", "not valid YAML")}
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=expected):
            load_config(tmp_path / name)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ValueError, match=r"config file not found: .*confg.yaml. Did you mean .*config.yaml\?"):
        load_config("confg.yaml")


def test_overrides():
    config = load_config(
        "config.yaml", ["train.max_steps=7", "llm.path=a=b", "data.sources.1.name=x", "gui={port: 99}"]
    )
    assert (config.train.max_steps, config.llm.path, config.data.sources[1].name, config.gui.port) == (
        7,
        "a=b",
        "x",
        99,
    )
    with pytest.raises(ValueError, match="'train.max_steps' is not of the form key=value"):
        load_config("config.yaml", ["train.max_steps"])
    with pytest.raises(ValueError, match=r"item 9 does not exist, the list has 3"):
        load_config("config.yaml", ["data.sources.9.name=x"])
    with pytest.raises(ValueError, match="'epochs' is a value, not a section"):
        load_config("config.yaml", ["train.epochs.x=1"])
    with pytest.raises(ValueError, match=r"unknown key 'train\.max_step'"):
        load_config("config.yaml", ["train.max_step=1"])
    assert parse_overrides(["a.b=1=2"]) == {"a.b": "1=2"}
    with pytest.raises(ValueError, match="form key=value"):
        parse_overrides(["=1"])


def test_missing_path_names_key_and_neighbour(tmp_path):
    (tmp_path / "photos 照片").mkdir()
    assert existing_path(tmp_path / "photos 照片", "data.x", "folder").is_dir()
    with pytest.raises(ValueError, match=r"'data\.x': folder not found: .*fotos 照片. Did you mean .*photos 照片\?"):
        existing_path(tmp_path / "fotos 照片", "data.x", "folder")
    with pytest.raises(ValueError, match=r"The folder .*nowhere does not exist"):
        existing_path(tmp_path / "nowhere" / "a" / "b", "data.x")
    with pytest.raises(ValueError, match="is not a file"):
        existing_path(tmp_path / "photos 照片", "data.x")


def test_relative_paths_count_from_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert existing_path("config.yaml", "x") == REPO_ROOT / "config.yaml"
    assert "train.output_dir" in key_paths()
    assert "data.sources.0.format" in key_paths()
