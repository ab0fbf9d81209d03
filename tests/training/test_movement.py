"""How far each part moved, beside the change of all its weights."""

import math
import shutil

import pytest
import torch

from model.checkpoint_folder import STATE_FILE, checksum
from tests.training.runs import lines
from training.loop import Trainer
from training.movement import MOST, describe_movement, movement, sample_weights


def exact(before, after):
    """The definition, on all weights, in float64."""
    change = sum((after[name].double() - before[name].double()).square().sum() for name in before)
    return math.sqrt(change / sum(weight.double().square().sum() for weight in before.values()))


def copies(part):
    return {name: weight.detach().clone() for name, weight in part.parameters.items()}


def test_it_equals_the_change_of_all_weights(config, tmp_path):
    trainer = Trainer(config())
    before = {part.name: copies(part) for part in trainer.model.parts}
    trainer.run()
    logged = lines(tmp_path / "run")[-1]
    for part in trainer.model.parts:
        assert max(weight.numel() for weight in part.parameters.values()) <= MOST  # so nothing is left out
        # the order of sums in float64
        assert logged[f"moved/{part.name}"] == pytest.approx(exact(before[part.name], copies(part)), rel=1e-12)
        assert logged[f"moved/{part.name}"] > 0


def test_large_tensors_are_estimated(configure):
    model = Trainer(configure(parts={"llm": {"lr": 1e-3, "mode": "full"}})).model
    part = next(part for part in model.parts if part.name == "llm")
    largest = max(part.parameters, key=lambda name: part.parameters[name].numel())
    assert part.parameters[largest].numel() > 2 * MOST
    before, start = copies(part), sample_weights(model)
    assert len(start["llm"][largest]) <= MOST
    with torch.no_grad():
        for weight in part.parameters.values():
            weight.add_(torch.randn_like(weight) * weight.std().nan_to_num())
    # thousands of independent numbers estimate a sum of squares to about 2 %; without the weight that each kept number
    # has for those left out, the large tensors would count for a fraction
    assert movement(model, start)["llm"] == pytest.approx(exact(before, copies(part)), rel=0.05)


def test_large_tensors_count_by_their_size(configure):
    model = Trainer(configure(parts={"llm": {"lr": 1e-3, "mode": "full"}})).model
    part = next(part for part in model.parts if part.name == "llm")
    largest = max(part.parameters.values(), key=torch.Tensor.numel)
    with torch.no_grad():
        for weight in part.parameters.values():
            weight.fill_(1.0)
        start, before = sample_weights(model), copies(part)
        largest.fill_(3.0)
    share = exact(before, copies(part))
    # numel / kept is exact for equal numbers
    assert movement(model, start)["llm"] == pytest.approx(share, rel=1e-12)


def test_a_part_of_zeros_and_one_that_stays(configure):
    model = Trainer(configure()).model
    projector = next(part for part in model.parts if part.name == "projector")
    with torch.no_grad():
        for weight in projector.parameters.values():
            weight.zero_()
        start = sample_weights(model)
        next(iter(projector.parameters.values())).fill_(2.0)
    moved = movement(model, start)
    assert moved == {"projector": 1.0, "lora": 0.0}
    assert describe_movement(moved | {"projector": 0.03141}) == (
        "projector moved by 3.14 %, lora did not move (relative change of the weights, in norm)"
    )


def test_a_resumed_run_counts_from_its_true_start(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for number in (3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{number}")
    Trainer(config(), resume="auto").run()
    first, second = (
        {name: share for name, share in lines(folder)[-1].items() if name.startswith("moved/")}
        for folder in (whole, tmp_path / "run")
    )
    assert first == second
    assert len(first) == 2


def test_an_older_checkpoint_without_a_start_says_nothing(config, whole, capsys):
    shutil.rmtree(whole / "checkpoint-4")
    file = whole / "checkpoint-3" / STATE_FILE
    state = torch.load(file, weights_only=True)
    del state["start"]
    sum_before = checksum(file)
    torch.save(state, file)
    provenance = whole / "checkpoint-3" / "provenance.json"
    provenance.write_text(provenance.read_text().replace(sum_before, checksum(file)))
    capsys.readouterr()
    Trainer(config("whole"), resume="auto").run()
    assert "moved" not in capsys.readouterr().out
    assert not any(name.startswith("moved/") for name in lines(whole)[-1])
