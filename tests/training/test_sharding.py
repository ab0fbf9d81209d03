"""`train.shard`: each process holds its share of every weight, and trains as one that has all. Gloo, on the CPU."""

from pathlib import Path

import pytest

from config import Config
from errors import UserError
from model.checkpoint import load_checkpoint
from tests.training.launches import launch, same_weights
from tests.training.runs import lines, weights
from training.loop import Trainer

RATES = {"projector": {"lr": 1e-2}, "llm": {"lr": 1e-2}}

SHARDED = {  # equal to one process that has all weights
    "plain": {"max_questions": 2},
    "words": {"word_alignment": 3},
    "align": {"parts": {"projector": {"lr": 1e-2}, "llm": {"lr": 0.0}}},  # text only: nothing of a batch is trained
    "checkpointing": {"gradient_checkpointing": "on", "data": {"val_fraction": 0.25}, "eval_steps": 1, "max_steps": 2},
    "all weights": {"parts": RATES | {"llm": {"mode": "full", "lr": 1e-3}, "vision": {"mode": "full", "lr": 1e-3}}},
    "lora on the encoder": {"visual": "clip", "parts": RATES | {"vision": {"mode": "lora", "lr": 1e-3}}},
}


@pytest.mark.nightly  # a minute of two cores
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_weights_train_as_whole_ones(make_case, tmp_path, workshop, processes):
    prefix, shard = f"shard {processes} ", {"shard": True, "micro_batch": 1}
    one = [make_case(prefix + "one " + name, **kind | {"accumulation": processes}) for name, kind in SHARDED.items()]
    resumed = {"save_steps": 100, "folder": prefix + "signal"} | shard
    several = [
        *[make_case(prefix + name, **kind | shard) for name, kind in SHARDED.items()],
        make_case(prefix + "signal", more={"fault": "signal"}, **resumed),
        make_case(prefix + "after signal", more={"resume": "auto"}, **resumed),
        make_case(prefix + "bad batch", more={"fault": "bad batch"}, save_steps=100, **shard),
    ]
    results, stderr = launch(several, processes, tmp_path / "several")
    assert all(result is not None for found in results.values() for result in found), (results, stderr[-3000:])
    single, _ = launch(one, 1, tmp_path / "one")
    for name in SHARDED:
        (expected,), actual = single[prefix + "one " + name], results[prefix + name]
        assert len({result["folder"] for result in actual}) == 1, actual
        whole, sharded = Path(expected["folder"]), Path(actual[0]["folder"])
        assert sorted(file.name for file in whole.rglob("*")) == sorted(file.name for file in sharded.rglob("*"))
        for first, second in zip(lines(whole.parent), lines(sharded.parent), strict=True):
            # AdamW's first steps are as large for a gradient of rounding errors as for any other
            bounds = {"loss": 1e-5, "grad_norm": 1e-4} if first["step"] == 1 else {"loss": 1e-4}
            bounds["val_loss"] = 1e-4
            for figure, bound in bounds.items():
                assert second.get(figure, 0) == pytest.approx(first.get(figure, 0), rel=bound), (name, figure)
        wanted, found = weights(whole), weights(sharded)
        assert wanted.keys() == found.keys()
        for tensor, expected_weight in wanted.items():
            # a weight whose gradient is rounding errors moves by a whole step in either direction; wrong sums of
            # gradients would move most of them so
            apart = (found[tensor] - expected_weight).abs() > 1e-2 * expected_weight.square().mean().sqrt()
            assert apart.sum() <= max(1, apart.numel() // 100), (name, tensor)
        load_checkpoint(sharded, overrides={"model_root": str(workshop)})
    assert results[prefix + "signal"] == [{"exit": 128 + 15}] * processes
    same_weights({"a": results[prefix + "plain"], "b": results[prefix + "after signal"]}, "a", "b", processes)
    assert {result["error"] for result in results[prefix + "bad batch"]} == {
        f"process {processes - 1}: the question fills 'data.max_length'"
    }


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({}, "start it with torchrun"), ({"compile": True}, "torchrun"), ({"dry_run": True}, "--dry-run measures")],
)
def test_sharding_needs_several_processes(configure, settings, remedy):
    arguments = {"dry_run": settings.pop("dry_run")} if "dry_run" in settings else {}
    with pytest.raises(UserError, match=remedy):
        Trainer(configure(shard=True, **settings), **arguments)


def test_each_process_holds_its_share_of_every_weight(make_case, tmp_path):
    """Equal losses alone would not show it: DistributedDataParallel gives them too."""
    one = Trainer(Config.model_validate(make_case("whole", accumulation=2)["config"])).run().parent
    results, stderr = launch([make_case("shares", shard=True)], 2, tmp_path / "out")
    assert None not in results["shares"], stderr[-3000:]
    for result in results["shares"]:
        assert result["gathered"] == [1]  # of two layers
        for group in ("frozen language model", "LoRA", "projector", "encoder", "optimizer state"):
            found = result["held"][group]
            assert found["tensors"] == found["sharded"] > 0, group
            assert found["own"] / found["whole"] == pytest.approx(1 / 2, abs=0.02), group
    shares = [result["held"] for result in results["shares"]]
    for group, found in shares[0].items():
        assert sum(held[group]["own"] for held in shares) == found["whole"], group
    losses = lines(Path(results["shares"][0]["folder"]).parent)
    assert [line["loss"] for line in losses] == pytest.approx([line["loss"] for line in lines(one)], rel=1e-4)
