"""Several processes: equal to one, and never waiting for one that has ended. Communication by gloo, on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from config import Config
from errors import UserError
from model.checkpoint_folder import damage, list_checkpoints
from paths import REPO_ROOT
from tests.telling import free_port
from tests.training.launches import ACCELERATE, launch, same_weights
from tests.training.runs import lines, losses, weights
from training.loop import Trainer

RATES = {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}}
EQUAL = {  # to one process that makes as many micro-batches itself
    "plain": {},  # some processes draw only text in some steps
    "budget": {"tokens_per_batch": 300, "max_steps": 2},
    "cache": {"data": {"cache_features": True}},
    "validation": {"data": {"val_fraction": 0.4}, "eval_steps": 1, "eval_samples": 2, "max_steps": 2},
    "several epochs": {"max_steps": 9, "micro_batch": 2},
    # of CLIP, some weights do nothing for the output; its processes draw only text in some steps, too
    "encoder": {"visual": "clip", "parts": RATES | {"vision": {"mode": "full", "lr": 1e-3}}},
    "lora on the encoder": {"parts": RATES | {"vision": {"mode": "lora", "lr": 1e-3}}},
    "words": {"word_alignment": 3},
}
# six micro-batches are no multiple of four, and what is left of them belongs to no step of four processes
FOUR = {
    "budget": {"max_steps": 1},
    "validation": {"data": {"val_fraction": 0.25}},
    # lower rates than RATES, so that the rounding errors of the sums grow less in nine of AdamW's steps
    "several epochs": {"micro_batch": 1, "parts": {"projector": {"lr": 1e-3}, "llm": {"lr": 1e-3}}},
}


@pytest.fixture(scope="module", params=[2, *(pytest.param(number, marks=pytest.mark.nightly) for number in (3, 4))])
def together(request, make_case, workshop, tmp_path_factory):
    """All cases that end in every process, by one launch of each number of processes, and of one process."""
    processes = request.param
    prefix = f"{processes} "
    captions = json.loads((workshop / "captions.json").read_text())
    other = make_case.root / f"other-{processes}.json"
    other.write_text(json.dumps(captions | {"0": captions["0"][:1]}))
    few = make_case.root / f"few-{processes}.json"
    few.write_text(json.dumps({"0": captions["0"]}))
    auto = {"micro_batch": "auto", "samples_per_step": 2, "gradient_checkpointing": "auto"}
    equal = {name: kind | (FOUR.get(name, {}) if processes == 4 else {}) for name, kind in EQUAL.items()}
    one = [make_case(prefix + "one " + name, **kind | {"accumulation": processes}) for name, kind in equal.items()]
    interrupted = {"save_steps": 100, "folder": prefix + "signal"}
    stages = {"stages": [{"name": "align", "train.parts.llm.lr": 0, "train.max_steps": 1}, {}], "save_steps": 100}
    second = stages | {"folder": prefix + "stages signal"}
    several = [
        *[make_case(prefix + name, **kind) for name, kind in equal.items()],
        make_case(prefix + "auto", **auto),
        make_case(prefix + "signal", more={"fault": "signal"}, **interrupted),
        make_case(prefix + "after signal", more={"resume": "auto"}, **interrupted),
        make_case(prefix + "stages", **stages),
        make_case(prefix + "stages signal", more={"fault": "signal"}, **second),
        make_case(prefix + "after stages signal", more={"resume": "auto"}, **second),
        make_case(prefix + "stages again", **second),
        make_case(prefix + "bad batch", more={"fault": "bad batch"}, save_steps=100),
        make_case(prefix + "small epoch", data={"captions": str(few)}, micro_batch=16, max_questions=16),
        make_case(prefix + "other data", more={"other captions": str(other)}),
        make_case(prefix + "own disk", folder=prefix + "signal", more={"resume": "auto", "own disk": True}),
        make_case(prefix + "in the way", folder=prefix + "signal"),
    ]
    results, stderr = launch(several, processes, tmp_path_factory.mktemp("several") / "out")
    single, _ = launch(one, 1, tmp_path_factory.mktemp("one") / "out")
    results = {name.removeprefix(prefix): result for name, result in (results | single).items()}
    assert all(result is not None for found in results.values() for result in found), (results, stderr[-3000:])
    return processes, results


@pytest.mark.parametrize("name", EQUAL)
def test_several_processes_equal_one(together, name):
    processes, results = together
    (one,), several = results["one " + name], results[name]
    assert [result.get("folder") for result in several] == [several[0]["folder"]] * processes
    expected, actual = weights(Path(one["folder"])), weights(Path(several[0]["folder"]))
    for tensor in expected:  # float32 sums in another order, carried through some AdamW steps
        assert (actual[tensor] - expected[tensor]).norm() <= 1e-3 * expected[tensor].norm(), tensor
    for first, second in zip(lines(Path(one["folder"]).parent), lines(Path(several[0]["folder"]).parent), strict=True):
        # the first step's loss comes before AdamW, whose steps are as large for rounding errors as for other gradients
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5 if first["step"] == 1 else 1e-4)
        assert second["supervised_tokens"] == first["supervised_tokens"]
        assert ("val_loss" in first) == ("val_loss" in second)
        assert second.get("val_loss", 0.0) == pytest.approx(first.get("val_loss", 0.0), rel=1e-4)


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_resumes(together, make_case):
    processes, results = together
    assert results["signal"] == [{"exit": 128 + 15}] * processes
    same_weights(results, "plain", "after signal", processes)
    folder = make_case.root / f"{processes} signal"
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert not any(damage(path) for path in list_checkpoints(folder))


def test_a_signal_in_the_second_stage_ends_all_which_resume_there(together, make_case):
    processes, results = together
    assert results["stages signal"] == [{"exit": 128 + 15}] * processes
    same_weights(results, "stages", "after stages signal", processes)
    folder = make_case.root / f"{processes} stages signal"
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert [path.name for path in list_checkpoints(folder / "1-align")] == ["checkpoint-1"]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]


def test_a_bad_batch_in_one_process_is_one_sentence_in_all(together, make_case):
    processes, results = together
    sentences = {result["error"] for result in results["bad batch"]}
    assert sentences == {f"process {processes - 1}: the question fills 'data.max_length'"}
    folders = list_checkpoints(make_case.root / f"{processes} bad batch")
    assert [path.name for path in folders] == ["checkpoint-1"]  # they still saved together


SENTENCES = {
    "small epoch": "fewer than the {} processes: lower train.micro_batch",
    "other data": "process 1: has other data and config than process 0",
    "own disk": "process 1: {{}} is not on this machine: set train.output_dir to a folder that all machines share",
    "in the way": "already holds checkpoint-3: go on from it with --resume auto",
    "stages again": "1-align already holds checkpoint-1: go on from it with --resume auto",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_trouble_is_one_sentence_in_every_process(together, name):
    processes, results = together
    for result in results[name]:
        for part in SENTENCES[name].format(processes).split("{}"):
            assert part in result["error"]


def test_auto_is_the_same_in_every_process(together):
    _, results = together
    settings = [result["setting"] for result in results["auto"]]
    assert settings == [[2, 1, False]] * len(settings)


@pytest.mark.parametrize("fault", ["killed", pytest.param("out of memory", marks=pytest.mark.nightly)])
def test_a_process_that_ends_alone_ends_the_others(make_case, tmp_path, fault):
    case = make_case(fault, more={"fault": fault}, save_steps=1)
    results, _ = launch([case], 2, tmp_path / "out")
    first, last = results[fault]
    assert first == {"error": "another process of this run has ended; its own message says why"}
    assert last is None if fault == "killed" else last["error"].startswith("out of memory at step 2")
    (checkpoint,) = list_checkpoints(Path(case["config"]["train"]["output_dir"]))
    assert not damage(checkpoint)


@pytest.mark.nightly  # torchrun, above, starts the same processes
@pytest.mark.parametrize(("file", "shard"), [("one_machine.yaml", False), ("fsdp2.yaml", True)])
def test_accelerate_launches_it_too(make_case, tmp_path, file, shard):
    case = make_case(f"by accelerate, {file}", max_steps=1, shard=shard)
    results, stderr = launch([case], 2, tmp_path / "out", ACCELERATE.format(file, 0))
    first, last = results[case["name"]]
    assert first["folder"] == last["folder"], stderr[-2000:]
    assert processes_of(first) == 2
    assert ("held" in first) == shard


def processes_of(result):
    return torch.load(Path(result["folder"]) / "trainer_state" / "state.pt", weights_only=True)["processes"]


def two_machines(launcher):
    port = free_port()
    if launcher == "torchrun":
        there = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
        return [f"-m torch.distributed.run {there}"] * 2
    machine = ACCELERATE.format("two_machines.yaml", port) + " --main_process_ip 127.0.0.1 --machine_rank "
    return [machine + "0", machine + "1"]


@pytest.mark.nightly  # half a minute each
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_launchers_are_one_run(make_case, tmp_path, launcher):
    """As on two machines, which are here one, with a process each."""
    one = Trainer(Config.model_validate(make_case(f"one for {launcher}", accumulation=2)["config"])).run()
    case = make_case(f"two by {launcher}")
    results, stderr = launch([case], 2, tmp_path / "out", *two_machines(launcher))
    first, last = results[case["name"]]
    assert first == last, stderr[-2000:]
    assert processes_of(first) == 2
    expected, actual = (losses(folder.parent) for folder in (one, Path(first["folder"])))
    assert actual == pytest.approx(expected, rel=1e-4)


def test_accelerate_that_starts_one_process_in_place_of_several_is_refused(configure, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # what it sets without MPI
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="asked for several processes on the CPU and started one"):
        Trainer(configure())


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_would_share_the_weights_in_another_way_is_refused(configure, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"accelerate's {name} is not used here.*train\.shard=true"):
        Trainer(configure())


def test_the_configuration_of_two_machines_is_one():
    config = load_config_from_file(str(REPO_ROOT / "configs" / "accelerate" / "two_machines.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 16)


def test_frozen_tensors_are_never_sent(configure):
    """What DistributedDataParallel broadcasts at its start and before each forward pass is all but the ignored."""
    trainer = Trainer(configure())
    ignored = set(trainer.wrapped._ddp_params_and_buffers_to_ignore)
    sent = {name for name, _ in trainer.wrapped.named_parameters()} - ignored
    assert sent == {name for name, parameter in trainer.wrapped.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in trainer.wrapped.named_buffers()} <= ignored
