"""Keys of earlier versions: each works with a sentence in the log, or is refused in one."""

import pytest
import yaml

from config import load_config
from errors import UserError

RENAMED_KEYS = [
    ("visual.drop_first_token", True, "visual.drop", "first"),
    ("visual.drop_first_token", False, "visual.drop", "none"),
    ("train.projector_lr", 0.5, "train.parts.projector.lr", 0.5),
    ("train.lora_lr", 0.0, "train.parts.llm.lr", 0.0),
]


def written(folder, **sections):
    """A config file with these keys beside the paths that every one has."""
    raw = {"visual": {"path": "v"}, "llm": {"path": "l"}}
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value
    (folder / "my.yaml").write_text(yaml.safe_dump(raw))
    return folder / "my.yaml"


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("old", "value", "new", "meaning"), RENAMED_KEYS)
def test_renamed_keys_work_and_say_so(tmp_path, caplog, old, value, new, meaning):
    plain = written(tmp_path)
    assert value_of(load_config(plain), new) != meaning or new == "visual.drop"
    sentence = f"'{old}' is called '{new}' now and means {meaning}"
    for overrides in ([f"{old}={value}"], {old: value}):  # of a command line, and in Python
        caplog.clear()
        assert value_of(load_config(plain, overrides), new) == meaning
        assert [record.message for record in caplog.records] == [f"override: {sentence}"]
    caplog.clear()
    file = written(tmp_path, **nested(old, value))
    assert value_of(load_config(file), new) == meaning
    assert [record.message for record in caplog.records] == [f"{file}: {sentence}"]


@pytest.mark.parametrize(("old", "value", "new", "meaning"), RENAMED_KEYS)
def test_both_names_in_one_file_are_refused(tmp_path, old, value, new, meaning):
    section, both = old.split(".")[0], nested(new, meaning)
    both[section] |= nested(old, value)[section]
    with pytest.raises(UserError, match=f"'{old}' is the earlier name of '{new}', and both are given: remove '{old}'"):
        load_config(written(tmp_path, **both))


@pytest.mark.parametrize(("old", "value", "new", "meaning"), RENAMED_KEYS)
def test_an_override_by_its_earlier_name_beats_the_file(tmp_path, old, value, new, meaning):
    other = "leading" if new == "visual.drop" else 0.25
    file = written(tmp_path, **nested(new, other))
    assert value_of(load_config(file), new) == other
    assert value_of(load_config(file, [f"{old}={value}"]), new) == meaning
    file = written(tmp_path, **nested(old, value))
    assert value_of(load_config(file, [f"{new}={other}"]), new) == other


def test_an_override_changes_one_of_two_sections_with_an_anchor(tmp_path):
    text = "visual: {path: v, lora: &lora {r: 32}}\nllm: {path: l, lora: *lora}\n"
    text += "data: {sources: [&first {name: a, format: llava, annotations: f, images: g}, {<<: *first, name: b}]}\n"
    (tmp_path / "my.yaml").write_text(text)
    config = load_config(tmp_path / "my.yaml", ["llm.lora.r=8", "data.sources.1.images=h"])
    assert (config.visual.lora.r, config.llm.lora.r) == (32, 8)
    assert [source.images for source in config.data.sources] == ["g", "h"]


def test_a_wrong_value_of_a_renamed_key_names_the_key_of_today(tmp_path):
    for override in ("visual.drop_first_token=3", "visual.drop_first_token=[1]"):
        with pytest.raises(UserError, match=r"'visual\.drop' = "):
            load_config(written(tmp_path), [override])
    with pytest.raises(UserError, match=r"'train\.parts\.llm\.lr' = -1"):
        load_config(written(tmp_path, train={"lora_lr": -1}))
    with pytest.raises(UserError, match=r"'parts' is a value, not a section"):
        load_config(written(tmp_path, train={"lora_lr": 1, "parts": 3}))


def test_a_removed_key_is_dropped_where_it_changes_nothing(tmp_path, caplog):
    plain = load_config(written(tmp_path))
    assert load_config(written(tmp_path, train={"attention": "sdpa"})) == plain
    assert load_config(written(tmp_path), ["train.attention=sdpa"]) == plain
    assert not caplog.messages
    assert load_config(written(tmp_path, train={"attention": "flex"})) == plain
    assert load_config(written(tmp_path), ["train.attention=flex"]) == plain
    assert all("'train.attention' = flex has no effect any more: sdpa is used" in said for said in caplog.messages)
    assert len(caplog.messages) == 2
