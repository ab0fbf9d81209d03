"""The figures of a run: what a line of the log says, what arithmetic counts, what worker processes know."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.batches import supervised_tokens
from training.costs import PeakMemory, matrix_peak
from training.loop import Trainer


def log_lines(trainer):
    trainer.run()
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_about_the_steps_since_the_line_before(configure, monkeypatch):
    trainer = Trainer(configure(max_steps=7, log_steps=3))
    steps = []
    inner = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda batches: steps.append(inner(batches)) or steps[-1])
    lines = log_lines(trainer)
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    for line, (first, last) in zip(lines, [(0, 1), (1, 3), (3, 6), (6, 7)], strict=True):
        window = steps[first:last]
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in window) / len(window))
        assert line["lora_lr"] == window[-1]["lora_lr"]
        tokens = sum(step["tokens"] for step in window)
        assert line["tokens_per_second"] * line["seconds"] * len(window) == pytest.approx(tokens)
        assert 0 < line["mfu"] < 1
        assert 0 <= line["data_wait"] <= 1
        assert line["peak_memory_gib"] > 0.1
    names = set(lines[0])
    documented = (__import__("training.run_log").run_log.__doc__).replace(",", " ").split()
    assert names <= set(documented)


class MatrixProducts(TorchDispatchMode):
    """Counts the operations of all matrix products; torch's own counter does not know the one in place."""

    operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            (rows, inner), (_, columns) = (tensor.shape for tensor in arguments[-2:])
            self.operations += 2 * rows * inner * columns
        return function(*arguments, **(settings or {}))


@pytest.mark.parametrize("cache", [False, True])
def test_arithmetic_equals_the_matrix_products_that_run(configure, cache):
    trainer = Trainer(configure(micro_batch=1, data={"cache_features": cache}))
    batch = next(iter(trainer._loader(trainer.train_set, [[0]])))
    with MatrixProducts() as counter:
        trainer.forward(batch, None).backward()
    tokens, supervised = batch["input_ids"].numel(), supervised_tokens(batch)
    assert trainer.arithmetic.operations(tokens, supervised, 1, 0 if cache else 1) == counter.operations


def test_workers_that_outlive_an_epoch_choose_the_answers_of_the_next(configure, workshop, tmp_path):
    captions = json.loads((workshop / "captions.json").read_text())
    for ID in range(6):
        captions[str(ID)][0]["a"] = ["one", "twenty", "three hundred"]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    data = {"captions": str(tmp_path / "captions.json")}
    losses = []
    for workers in (0, 1):
        output = str(tmp_path / str(workers))
        trainer = Trainer(
            configure(max_steps=6, micro_batch=4, workers=workers, log_steps=1, data=data, output_dir=output)
        )
        assert trainer.steps_per_epoch == 2
        losses.append([line["loss"] for line in log_lines(trainer)])
    assert losses[0] == losses[1]


def test_peaks_of_this_machine():
    device = torch.device("cpu")
    assert 1e9 < matrix_peak(device, torch.float32) == matrix_peak(device, torch.float32)
    with PeakMemory(device) as small:
        pass
    with PeakMemory(device) as large:
        torch.ones(50 * 2**20)
    assert 150 * 2**20 < large.bytes - small.bytes < 250 * 2**20
