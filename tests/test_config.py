"""Each mistake in a config is one sentence that names the key."""

import os
from pathlib import PureWindowsPath

import pytest
from pydantic import BaseModel

from backbones.backbone import locate_backbone
from config import Config, Generate, changed, load_config, load_data, parse_config, parse_overrides
from config_messages import key_paths
from errors import UserError
from model.checkpoint import check_complete
from paths import REPO_ROOT, check_folder, check_writable, existing_path, nearest_name_hint

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
        (
            {"train": {"parts": {"projector": {"lr": -1}}}},
            "'train.parts.projector.lr' = -1: Input should be greater than",
        ),
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
    assert "train.output_dir" in key_paths(Config)
    assert "data.sources.0.format" in key_paths(Config)


def test_a_message_tells_mistakes_of_overrides_from_those_of_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text("visual: {path: a}\nllm: {path: b}\ntrain: {epoch: 2}\n")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "my.yaml", ["train.max_step=3", "llm.lora={rank: 4}"])
    in_file = "unknown key 'train.epoch', did you mean 'train.epochs'?"
    assert f"; {in_file}" in str(caught.value) or f"my.yaml: {in_file}" in str(caught.value)
    assert "in an override: unknown key 'train.max_step', did you mean 'train.max_steps'?" in str(caught.value)
    assert "in an override: unknown key 'llm.lora.rank', " in str(caught.value)


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        load_config("config.yaml", list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1500
    return text


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e308", "-1", "0xffffffffffffffffffffffffffffffff"])
def test_extremes_of_every_number_are_refused(value):
    numbers = [
        key
        for key, annotation in leaf_annotations(Config)
        if any(kind in str(annotation) for kind in ("int", "float")) and "Lora" not in str(annotation)
    ]
    assert len(numbers) > 35
    for key in numbers:
        override = f"{key}=[{value}, 0.9]" if key == "train.betas" else f"{key}={value}"
        assert key in refusal(override), override


def leaf_annotations(section, prefix=""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaf_annotations(field.annotation, f"{prefix}{name}.")
        elif name == "sources":
            yield f"{prefix}sources.0.weight", float
        else:
            yield prefix + name, field.annotation


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generate.temperature=1e-40", "at least 0.01"),
        ("generate.repetition_penalty=1e-300", "greater than or equal to 0.01"),
        ("generate.top_k=-1", "'generate.top_k' = -1"),
        ("generate.min_p=1.5", "'generate.min_p' = 1.5"),
        ("generate.stop=['']", "'generate.stop.0' = '': String should have at least 1 character"),
        ("generate.stop=[" + "a, " * 17 + "]", "'generate.stop'"),
        ("generate.stop=word", "'generate.stop' = 'word'"),
        ("projector.init_std=1e-300", "greater than or equal to"),
        ("llm.lora.r=9999999", "4096"),
        ("train.betas=[1.0, 0.9]", "'train.betas.0' = 1.0"),
        ("train.seed=18446744073709551616", "'train.seed'"),
        ("gui.port=65536", "'gui.port'"),
    ],
)
def test_bounds(override, expected):
    assert expected in refusal(override)


def test_values_that_yaml_itself_cannot_read():
    assert "'train.epochs=111" in refusal("train.epochs=" + "1" * 5000)
    assert "a number of 20000 bits" in refusal("train.epochs=0x" + "f" * 5000)
    assert "'gui=[[[[" in refusal("gui=" + "[" * 3000)
    assert "'train.epochs=!!int _'" in refusal("train.epochs=!!int _")
    assert "'train.epochs'" in refusal("train.epochs='" + "x" * 100_000 + "'")
    assert "unknown key" in refusal("x" * 100_000 + "=1")
    assert "item ² does not exist" in refusal("data.sources.².name=x")
    assert "does not exist" in refusal(f"data.sources.{'1' * 5000}.name=x")
    assert "'gui' = [[" in refusal("gui=&a [*a]")
    assert refusal(*(f"train.x{number}=1" for number in range(30))).endswith("and 27 more mistakes")
    # a date is a name like any other
    assert load_config("config.yaml", ["train.output_dir=2024-02-31"]).train.output_dir == "2024-02-31"


def test_files_that_yaml_itself_cannot_read(tmp_path):
    def message_of(content):
        (tmp_path / "my.yaml").write_text(content)
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / "my.yaml")
        assert len(str(caught.value)) < 1000
        return str(caught.value)

    assert "my.yaml: brackets are nested too deeply" in message_of("gui: " + "[" * 3000)
    assert "line 2, column 11 (epochs: 111" in message_of("train:\n  epochs: " + "1" * 5000)
    assert "found nothing" in message_of("")
    assert "not valid YAML" in message_of("a: \x01")


def test_a_password_that_is_not_yaml_is_not_shown():
    with pytest.raises(UserError, match=r"override 'gui\.password=…': the value is not valid YAML") as caught:
        parse_overrides(["gui.password=[secret"])
    assert "secret" not in str(caught.value)


def test_config_paths_that_are_no_file(tmp_path):
    def message_of(path):
        with pytest.raises(UserError) as caught:
            load_config(path)
        return str(caught.value)

    assert "is a folder" in message_of(tmp_path)
    assert "name too long" in message_of("x" * 300 + ".yaml")
    assert "folder" in message_of(tmp_path / "none" / "my.yaml")
    assert "my.yaml" in message_of(REPO_ROOT / "config.yaml" / "my.yaml")
    if os.path.exists("/proc/self/mem"):
        assert "/proc/self/mem: " in message_of("/proc/self/mem")


def test_values_given_in_python_are_taken_as_they_are(tmp_path):
    values = {
        "llm.path": tmp_path / "with #2 and: this",
        "prompt.system": "You are: x # really",
        "train.init_from": None,
        "train.output_dir": "2024-01-01",
    }
    config = load_config("config.yaml", values)
    assert config.llm.path == str(tmp_path / "with #2 and: this")
    assert config.prompt.system == "You are: x # really"
    assert config.train.init_from is None


def test_data_alone_needs_no_models(tmp_path):
    (tmp_path / "data.yaml").write_text("data: {captions: c.json}\ntrain: {epochs: 3}")
    assert load_data(tmp_path / "data.yaml", ["data.seed=3"]).seed == 3
    with pytest.raises(UserError, match=r"key 'visual' is missing; key 'llm' is missing"):
        load_config(tmp_path / "data.yaml")
    with pytest.raises(UserError, match=r"unknown key 'train\.epoch'"):
        load_data(tmp_path / "data.yaml", ["train.epoch=1"])


def test_a_changed_section_is_checked():
    settings = changed(Generate(), {"temperature": 0.5}, "the page")
    assert settings.temperature == 0.5
    with pytest.raises(UserError, match=r"the page: 'temperature' = inf"):
        changed(Generate(), {"temperature": float("inf")}, "the page")


def test_hints_name_what_can_be_meant_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("paths.REPO_ROOT", tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "passwd").touch()
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "tower.py").touch()
    assert nearest_name_hint(tmp_path / "vit-tiny") == ""
    assert nearest_name_hint(tmp_path / "visions") == ""  # a folder of code
    assert nearest_name_hint(tmp_path / "passwd") == "It is no folder. "  # and no "Did you mean passwd?"
    assert nearest_name_hint(tmp_path / "pasword", "file") == f"Did you mean {tmp_path / 'passwd'}? "
    (tmp_path / "vit-tiny-2").mkdir()
    assert nearest_name_hint(tmp_path / "vit-tiny") == f"Did you mean {tmp_path / 'vit-tiny-2'}? "
    for path in ("x" * 300, "a\0b", "x" * 300 + "/y", "\ud800", "~nosuchuser/x"):
        with pytest.raises(UserError, match=r"'data\.x'"):
            existing_path(path, "data.x")


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "a\0b"])
def test_folders_of_impossible_names(path):
    with pytest.raises(UserError, match="checkpoint folder not found"):
        check_complete(path)
    with pytest.raises(UserError, match=r"'llm\.path'") as caught:
        locate_backbone(path, "models", "llm.path")
    assert len(str(caught.value)) < 1500


def test_a_missing_drive_is_its_own_parent(monkeypatch):
    """As on Windows, where Z:\\ is not there; pathlib's Windows paths run on every system."""
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    assert nearest_name_hint(PureWindowsPath(r"Z:\models\Qwen")) == "The folder Z:\\ does not exist. "


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    check_writable(tmp_path / "kept.txt", "--output")
    check_writable(tmp_path / "new.txt", "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "kept"
    for path, expected in {
        tmp_path: "is a folder",
        tmp_path / "none" / "new.txt": "the folder of --output does not exist",
        tmp_path / ("x" * 300): "name too long",
    }.items():
        with pytest.raises(UserError, match=expected):
            check_writable(path, "--output")


def test_what_cannot_become_a_folder_is_said(tmp_path, monkeypatch):
    check_folder(tmp_path, "train.output_dir")
    check_folder(tmp_path / "a" / "b", "train.output_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.yaml").touch()
    for path, expected in {
        tmp_path / "file.yaml": "train.output_dir: .*file.yaml is not a folder",
        tmp_path / "file.yaml" / "a": "file.yaml is not a folder",
        tmp_path / ("x" * 300) / "a": "name too long",
    }.items():
        with pytest.raises(UserError, match=expected):
            check_folder(path, "train.output_dir")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        check_folder(tmp_path / "a", "train.output_dir")


def test_lora_of_the_encoder_has_defaults_of_its_own():
    lora = parse_config(GOOD | {"visual": {"path": "v", "lora": {"r": 4}}}, "my.yaml").visual.lora
    assert (lora.r, lora.alpha, lora.target_modules) == (4, 32, None)
    assert parse_config(GOOD, "my.yaml").visual.lora.r == 16
