"""Stages: each is a run of its own; interrupted anywhere and resumed, they equal an uninterrupted run."""

import gc
import re
import shutil
import signal
import weakref

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train as script
from errors import UserError
from model.checkpoint_folder import damage
from tests.tiny import tiny_config
from tests.training.conftest import DROPOUT
from tests.training.runs import at_step, lines, names, same, train
from training import stages, state
from training.build import make_accelerator
from training.loop import Trainer
from training.stages import describe, stage_configs

ALIGN = {"name": "align", "train.parts.llm.lr": 0, "train.max_steps": 2}
ALL = {"name": "all", "train.max_steps": 3, "data.seed": 7}
TWO = [ALIGN, ALL]
QUICK = {"max_new_tokens": 1}  # of the answers in samples.html


@pytest.fixture
def two(config):
    """`two(folder, **train)`: a run whose projector is trained alone for two steps, then all for three."""

    def build(folder="run", **more):
        made = config(folder, **{"stages": TWO} | more)
        return made.model_copy(update={"generate": made.generate.model_copy(update=QUICK)})

    return build


@pytest.fixture(scope="module")
def trained_once(workshop, tmp_path_factory):
    settings = {"save_steps": 1, "log_steps": 1, "save_total_limit": 9, "trackers": [], "stages": TWO}
    settings["output_dir"] = str(tmp_path_factory.mktemp("stages"))
    return train(tiny_config(workshop, llm=DROPOUT, train=settings, generate=QUICK)).parent


@pytest.fixture
def finished(trained_once, tmp_path):
    """The folder of an uninterrupted run of `two("whole")`."""
    return shutil.copytree(trained_once, tmp_path / "whole")


@pytest.fixture
def in_stage(monkeypatch):
    """`in_stage(number, interfere)`: call `interfere(trainer)` on the trainer of that stage, counted from 1."""

    def use(number, interfere):
        built = []

        def make(*given):
            trainer = Trainer(*given)
            built.append(None)  # and not the trainer, which would be kept in memory
            if len(built) == number:
                interfere(trainer)
            return trainer

        monkeypatch.setattr(stages, "Trainer", make)

    return use


def same_runs(first, second):
    """Whether all checkpoints and logged losses of two runs of the same stages are equal."""
    for stage in ("1-align", "."):
        assert names(first / stage) == names(second / stage)
        assert all(same(first / stage / name, second / stage / name) for name in names(first / stage))
        both = ([(line["step"], line["loss"]) for line in lines(folder / stage)] for folder in (first, second))
        assert next(both) == next(both)
    return True


# what a stage is


def test_each_stage_equals_a_run_that_is_configured_so(config, finished, tmp_path):
    align = Trainer(config("one", max_steps=2, lora_lr=0)).run()
    every = Trainer(config("two", max_steps=3, data={"seed": 7}, init_from=str(align))).run()
    assert same(finished / "1-align" / "checkpoint-2", align)
    assert same(finished / "checkpoint-3", every)
    assert [line["loss"] for line in lines(finished)] == [line["loss"] for line in lines(tmp_path / "two")]
    assert names(finished / "1-align") == ["checkpoint-1", "checkpoint-2"]
    assert names(finished) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    saved = yaml.safe_load((finished / "checkpoint-3" / "config.yaml").read_text())
    assert (saved["train"]["stages"], saved["data"]["seed"]) == ([], 7)
    assert saved["train"]["init_from"].endswith("checkpoint-2")
    assert yaml.safe_load((finished / "1-align" / "checkpoint-2" / "config.yaml").read_text())["data"]["seed"] == 0


def test_a_run_without_stages_is_as_before(config, whole, capsys):
    capsys.readouterr()
    folder = train(config())
    assert same(folder, whole / "checkpoint-4")
    said = capsys.readouterr().out
    assert not re.search(r"stage \d", said)
    assert f'ask it:  python predict.py --checkpoint "{folder}"' in said
    assert stage_configs(config()) == [config()]
    with pytest.raises(UserError, match="already holds checkpoint-4"):
        train(config())


def test_the_first_stage_begins_with_the_users_checkpoint(config, whole, two):
    start = load_file(whole / "checkpoint-4" / "feature_proj.safetensors")
    frozen = {"train.parts.projector.lr": 0, "train.max_steps": 1}
    folder = train(config(stages=[frozen, frozen], init_from=str(whole / "checkpoint-4")))
    assert names(folder.parent / "1-stage") == ["checkpoint-1"]
    end = load_file(folder / "feature_proj.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_the_log_says_what_moved_in_each_stage(two, capsys):
    capsys.readouterr()
    folder = train(two()).parent
    said = capsys.readouterr().out
    assert re.search(r"stage 1 of 2: align\n(.|\n)*projector moved by [\d.]+ %, lora did not move", said)
    assert re.search(r"stage 2 of 2: all\n(.|\n)*projector moved by [\d.]+ %, lora moved by [\d.]+ %", said)
    assert said.count("ask it:") == 1
    first, second = lines(folder / "1-align"), lines(folder)
    assert first[-1]["moved/lora"] == 0 < min(second[-1]["moved/lora"], first[-1]["moved/projector"])
    assert not any(name.startswith("moved/") for line in (*first[:-1], *second[:-1]) for name in line)


def test_the_model_of_a_stage_is_gone_when_the_next_is_built(two, in_stage, monkeypatch):
    kept = []
    in_stage(1, lambda trainer: kept.append(weakref.ref(trainer.model)))
    built = stages.Trainer

    def make(*given):
        assert not kept or kept[0]() is None
        return built(*given)

    monkeypatch.setattr(stages, "Trainer", make)
    train(two())
    gc.collect()
    assert kept[0]() is None


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_process_may_have_several_accelerators_of_one_precision(config, precision):
    for cached in (False, True):
        assert make_accelerator(config(precision=precision, data={"cache_features": cached}))[1] == precision


# what is wrong with a stage is said before any is trained

MISTAKES = {
    "unknown key 'train.epohcs', did you mean 'train.epochs'?": {"train.epohcs": 2},
    "'train.epochs' = 'two': Input should be a valid integer": {"train.epochs": "two"},
    "'train.max_steps.most': 'max_steps' is a value, not a section": {"train.max_steps.most": 3},
    "a stage cannot change 'visual.path', only keys of train and data": {"visual.path": "x"},
    "a stage cannot change 'llm.lora.r'": {"llm": {"lora": {"r": 2}}},
    "a stage cannot change 'train.output_dir'": {"train.output_dir": "x"},
    "a stage cannot change 'train.init_from'": {"train.init_from": "x"},
    "a stage cannot change 'train.precision'": {"train.precision": "bf16"},
    "a stage cannot change 'train.stages'": {"train.stages": []},
    "a stage cannot change 'epochs'": {"epochs": 3},
    "'train.parts.visoin' is not a part that can be trained, did you mean 'vision'?": {"train.parts.visoin.lr": 0},
    "name = 'a/b': it becomes part of a folder's name": {"name": "a/b"},
    "train.word_alignment is for a new projector: set it in the first stage": {"train.word_alignment": 5},
    "data.captions': file not found": {"data.captions": "nowhere.json"},
    "'train.parts.vision' trains the encoder": {"data.cache_features": True, "train.parts.vision.mode": "lora"},
    "trains nothing: give one of train.parts a learning rate": {"train.parts.llm.lr": 0, "train.parts.projector.lr": 0},
    "'train.parts.llm.mode' is 'frozen', but an earlier stage trains this part with 'lora'": {
        "train.parts.llm.mode": "frozen"
    },
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_in_a_later_stage_is_one_sentence_before_the_first(config, tmp_path, sentence):
    with pytest.raises(UserError, match=r"^'?train\.stages\.1.*" + re.escape(sentence)) as caught:
        train(config(stages=[{"train.max_steps": 1}, MISTAKES[sentence]]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_of_a_later_stage_that_is_not_installed_is_named_at_once(config, monkeypatch, tmp_path):
    monkeypatch.setattr("training.run_log.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(config(stages=[ALIGN, {"train.trackers": ["wandb"]}]))
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_was_never_trained_may_go(config):
    folder = train(config(stages=[ALIGN, {"train.parts.llm.mode": "frozen", "train.max_steps": 1}]))
    assert not (folder / "adapter_model.safetensors").exists()


def test_nested_keys_and_earlier_names_mean_the_same(config):
    plain = config(stages=[{"train.parts.llm.lr": 0}, ALL])
    for first in ({"train": {"parts": {"llm": {"lr": 0}}}}, {"train.lora_lr": 0}):
        assert stage_configs(config(stages=[first, ALL])) == stage_configs(plain)


def test_a_dry_run_describes_every_stage(two, tmp_path):
    first, second = describe(two(word_alignment=1))
    assert first.startswith("stage 1 of 2: align\n")
    assert "word_alignment" in first
    assert "word_alignment" not in second
    assert second.startswith("stage 2 of 2: all\n")
    assert "lora 0;" in first
    assert "lora 0;" not in second
    assert not (tmp_path / "run").exists()


# interrupted and resumed


@pytest.mark.parametrize(("stage", "step"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
def test_a_signal_in_any_stage_ends_the_run_which_resumes_as_if_nothing_had_been(
    two, finished, in_stage, monkeypatch, tmp_path, stage, step
):
    in_stage(stage, lambda trainer: at_step(trainer, step, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as caught:
        train(two())
    assert caught.value.code == 128 + signal.SIGTERM
    assert (names(tmp_path / "run") == []) == (stage == 1)
    monkeypatch.undo()
    train(two(), "auto")
    assert same_runs(tmp_path / "run", finished)


def test_a_signal_after_the_last_step_of_a_stage_begins_no_other(two, finished, monkeypatch, tmp_path):
    save = state.save

    def interrupted(run, *given):
        if run.progress.step == run.total_steps:  # the loop reads signals before it saves
            signal.raise_signal(signal.SIGTERM)
        return save(run, *given)

    monkeypatch.setattr(state, "save", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(two())
    assert caught.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "run" / "1-align") == ["checkpoint-1", "checkpoint-2"]
    assert names(tmp_path / "run") == []
    monkeypatch.undo()
    train(two(), "auto")
    assert same_runs(tmp_path / "run", finished)


@pytest.mark.parametrize("place", ["_forget_models", "_starting_from", "Trainer"])
def test_killed_between_two_stages(two, finished, monkeypatch, tmp_path, place):
    inner, calls = getattr(stages, place), []

    def fail(*given):
        calls.append(place)
        if place != "Trainer" or len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*given)

    monkeypatch.setattr(stages, place, fail)
    with pytest.raises(KeyboardInterrupt):
        train(two())
    assert names(tmp_path / "run" / "1-align") == ["checkpoint-1", "checkpoint-2"]
    assert names(tmp_path / "run") == []
    monkeypatch.undo()
    train(two(), "auto")
    assert same_runs(tmp_path / "run", finished)


def test_auto_begins_at_the_first_stage_and_ends_at_the_last(two, finished, tmp_path):
    train(two(), "auto")
    assert same_runs(tmp_path / "run", finished)
    assert train(two(), "auto") == tmp_path / "run" / "checkpoint-3"  # nothing is left to do
    assert same_runs(tmp_path / "run", finished)


def test_a_finished_run_that_is_resumed_into_another_folder_is_stored_there(config, whole, capsys, tmp_path):
    train(config("other"), str(whole / "checkpoint-4"))
    assert f"trained: {tmp_path / 'other' / 'checkpoint-4'}\n" in capsys.readouterr().out
    assert same(tmp_path / "other" / "checkpoint-4", whole / "checkpoint-4")


def test_a_checkpoint_of_the_present_stage_is_resumed(two, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "run" / name)
    train(two(), str(tmp_path / "run" / "checkpoint-1"))
    assert same_runs(tmp_path / "run", finished)


def test_a_checkpoint_of_an_earlier_stage_keeps_what_came_after_under_another_name(two, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    train(two(), str(tmp_path / "run" / "1-align" / "checkpoint-1"))
    said = capsys.readouterr().out
    for number in (1, 2, 3):
        name = f"checkpoint-{number}"
        assert f"{tmp_path / 'run' / name}.superseded: a checkpoint of a later stage, kept under this name" in said
        assert same(tmp_path / "run" / f"{name}.superseded", finished / name)
        assert same(tmp_path / "run" / name, finished / name)
        assert not damage(tmp_path / "run" / name)


@pytest.mark.parametrize("kept", ["1-align", "."])
def test_starting_anew_over_the_checkpoints_of_any_stage_is_refused(two, finished, kept):
    for folder in ("1-align", "."):
        for name in names(finished / folder) if folder != kept else []:
            shutil.rmtree(finished / folder / name)
    with pytest.raises(UserError, match="already holds checkpoint-.* --resume auto, or set another train.output_dir"):
        train(two("whole"))


OTHER = {
    "another name": ([{**ALIGN, "name": "start"}, ALL], "1-align holds checkpoints"),
    "one more in front": ([{"name": "warm"}, *TWO], "1-align holds checkpoints"),
    "one more behind": ([*TWO, {"name": "end"}], "whole holds checkpoints"),
}


@pytest.mark.parametrize("change", OTHER)
def test_checkpoints_of_other_stages_are_not_taken_for_these(two, finished, change):
    changed, sentence = OTHER[change]
    with pytest.raises(UserError, match=rf"'train\.stages': .*{sentence}.*set train.stages as they were"):
        train(two("whole", stages=changed), "auto")
    assert names(finished) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_no_stage_is_refused(two, whole):
    with pytest.raises(UserError, match=r"checkpoint-4 is not a checkpoint of any stage of 'train\.output_dir' = "):
        train(two(), str(whole / "checkpoint-4"))


def test_the_script_trains_and_resumes_stages(two, finished, in_stage, monkeypatch, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two().model_dump(mode="json")))
    in_stage(2, lambda trainer: at_step(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        script.main(["--config", str(file)])
    monkeypatch.undo()
    script.main(["--config", str(file), "--resume", "auto", "train.stages.1.train.max_steps=3"])
    assert same_runs(tmp_path / "run", finished)
