"""The figures of a run: what a line of the log says, what arithmetic counts, what worker processes know."""

import json
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import training.run_log
from training.batches import make_loader, supervised_tokens
from training.costs import PeakMemory, _products_per_second, matrix_peak, peak_sizes
from training.loop import Trainer, optimizer_step


def log_lines(trainer):
    trainer.run()
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_about_the_steps_since_the_line_before(configure, monkeypatch):
    trainer = Trainer(configure(max_steps=7, log_steps=3))
    steps = []
    inner = optimizer_step
    monkeypatch.setattr("training.loop.optimizer_step", lambda *given: steps.append(inner(*given)) or steps[-1])
    lines = log_lines(trainer)
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    for line, (first, last) in zip(lines, [(0, 1), (1, 3), (3, 6), (6, 7)], strict=True):
        window = steps[first:last]
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in window) / len(window))
        assert line["lora_lr"] == window[-1]["rates"]["lora_lr"]
        tokens = sum(step["tokens"] for step in window)
        assert line["tokens_per_second"] * line["seconds"] * len(window) == pytest.approx(tokens)
        assert "mfu" not in line  # of a CPU there is no peak
        assert 0 <= line["data_wait"] <= 1
        assert line["peak_memory_gib"] > 0.1
    table = re.findall(r"^ {4}(\S.*?)(?: {2,}|$)", training.run_log.__doc__, flags=re.MULTILINE)
    documented = {name for row in table for name in row.split(", ")} - {"…"}
    assert set(lines[0]) == documented - {"mfu", "val_loss", "val_loss/<source>", "moved/<part>"}


class MatrixProducts(TorchDispatchMode):
    """Counts the operations of all matrix products; torch's own counter does not know the one in place."""

    operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            (rows, inner), (_, columns) = (tensor.shape for tensor in arguments[-2:])
            self.operations += 2 * rows * inner * columns
        return function(*arguments, **(settings or {}))


@pytest.mark.parametrize(("cache", "lora_lr"), [(False, 1e-2), (True, 1e-2), (False, 0.0)])
def test_arithmetic_equals_the_matrix_products_that_run(configure, cache, lora_lr):
    trainer = Trainer(configure(micro_batch=1, lora_lr=lora_lr, data={"cache_features": cache}))
    batch = next(iter(make_loader(trainer.train_set, [[0]], 0, trainer.accelerator.device)))
    with MatrixProducts() as counter:
        trainer.forward(batch, None).backward()
    tokens, supervised = batch.input_ids.numel(), supervised_tokens(batch)
    assert trainer.arithmetic.operations(tokens, supervised, 1, 0 if cache else 1) == counter.operations


LLM_RATE, ENCODER_RATE = {"lr": 1e-2}, {"lr": 1e-3}


@pytest.mark.parametrize(
    "parts",
    [
        {"vision": {"mode": "lora"} | ENCODER_RATE},
        {"vision": {"mode": "full"} | ENCODER_RATE},
        {"vision": {"mode": "full"} | ENCODER_RATE, "projector": {"lr": 0.0}},
        {"llm": {"mode": "full"} | LLM_RATE},
        {"llm": {"mode": "full", "layers": [1]} | LLM_RATE},
        {"llm": {"mode": "lora", "layers": [0]} | LLM_RATE},
        {"llm": {"mode": "lora", "layers": [1]} | LLM_RATE},
        {"llm": {"mode": "frozen"}},
    ],
)
def test_arithmetic_of_other_trained_parts(configure, parts):
    trainer = Trainer(configure(micro_batch=1, parts={"projector": LLM_RATE, "llm": LLM_RATE} | parts))
    model = trainer.model
    batch = next(iter(make_loader(trainer.train_set, [[0]], 0, trainer.accelerator.device)))
    with MatrixProducts() as counter:
        trainer.forward(batch, None).backward()
    tokens, supervised = batch.input_ids.numel(), supervised_tokens(batch)
    expected = trainer.arithmetic.operations(tokens, supervised, 1, 1)
    head = model.language_model.lm_head.weight
    if head.requires_grad:  # its logits are computed again for the gradient, which is no arithmetic that is needed
        expected += supervised * 2 * head.numel()
    if parts.get("vision", {}).get("mode") == "lora":  # nothing flows back into the patches, which q, k and v read
        layer = model.encoder.encoder.layers[0].self_attn
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj):
            weights = linear.base_layer.weight.numel() + linear.lora_A["default"].weight.numel()
            expected -= 2 * model.encoder.all_rows * weights
    assert counter.operations == expected


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


def test_share_of_a_peak(configure, monkeypatch):
    trainer = Trainer(configure(max_steps=2, log_steps=1))
    monkeypatch.setattr(trainer, "matrix_peak", 1e15)
    for line in log_lines(trainer):
        operations = line["mfu"] * 1e15 * line["seconds"]
        assert operations == pytest.approx(round(operations), abs=1)
        assert 0 < line["mfu"] < 1


@pytest.mark.parametrize(
    ("free", "dtype", "sizes"),
    [
        (80e9, torch.bfloat16, [2048, 4096, 8192]),
        (80e9, torch.float32, [2048, 4096, 8192]),
        (4e9, torch.bfloat16, [2048, 4096]),
        (4e9, torch.float32, [2048, 4096]),
        (1e8, torch.float32, [2048]),
    ],
)
def test_measuring_a_peak_takes_a_tenth_of_the_memory(free, dtype, sizes):
    assert peak_sizes(int(free), dtype) == sizes


def test_products_of_a_round_are_counted(monkeypatch):
    times, products = iter([9.0, 4.0, 5.0, 4.0, 8.0]), []

    class Event:  # CUDA's, on a machine without
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            products.append(len(ran))

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return next(times)  # milliseconds

    ran = []
    mm = torch.mm
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda *arguments, out: ran.append(1) or mm(*arguments, out=out))
    before = torch.get_rng_state()
    assert _products_per_second(64, torch.device("cpu"), torch.float32) == pytest.approx(10 * 2 * 64**3 / 4e-3)
    assert products == [1, 11, 11, 21, 21, 31, 31, 41, 41, 51]  # the first product is not timed
    assert torch.equal(torch.get_rng_state(), before)


def test_peaks_of_this_machine():
    device = torch.device("cpu")
    assert matrix_peak(device, torch.float32) is None
    with PeakMemory(device) as small:
        pass
    with PeakMemory(device) as large:
        torch.ones(50 * 2**20)
    assert 150 * 2**20 < large.bytes - small.bytes < 250 * 2**20
