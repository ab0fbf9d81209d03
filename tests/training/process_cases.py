"""Run under torchrun by `launches.py`: several runs in one group of processes, each perhaps with a fault.

    torchrun --nproc-per-node 2 process_cases.py cases.json OUTPUT

Every process writes `OUTPUT/<case>-<rank>.json`: how the run ended there.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from config import Config
from errors import UserError
from tests.training.runs import train
from training import loop, stages, state
from training.agreement import lost_processes
from training.loop import Trainer

RANK = int(os.environ.get("RANK", "0"))


def in_step(trainer, number, action):
    """Call `action` in the forward pass of optimizer step `number`."""
    forward = trainer.forward

    def wrapped(*arguments):
        if trainer.progress.step == number - 1:
            action()
        return forward(*arguments)

    trainer.forward = wrapped


def bad_batch(trainer):
    inner = loop.optimizer_step

    def failing(run, batches, *rest):
        bad = run is trainer and run.progress.step == 1
        return inner(run, ["the question fills 'data.max_length'"] if bad else batches, *rest)

    loop.optimizer_step = failing


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


FAULTS = {  # what happens in the last process only
    "signal": lambda trainer: in_step(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM)),
    "bad batch": bad_batch,
    "out of memory": lambda trainer: in_step(trainer, 2, out_of_memory),
    "killed": lambda trainer: in_step(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGKILL)),
}


def train_stages(config, case):
    """As `train.py` does; a fault comes in the last stage."""

    class Faulty(Trainer):
        def __init__(self, stage, *given):
            super().__init__(stage, *given)
            last_stage = stage.train.output_dir == config.train.output_dir
            if last_stage and "fault" in case and int(os.environ["WORLD_SIZE"]) - 1 == RANK:
                FAULTS[case["fault"]](self)

    stages.Trainer = Faulty
    return train(config, case.get("resume"))


def held(trainer):
    """Of each group of tensors: how many there are, how many are shards, elements that this process has, and all."""
    groups = {}

    def count(group, tensor):
        found = groups.setdefault(group, {"tensors": 0, "sharded": 0, "own": 0, "whole": 0})
        sharded = isinstance(tensor, DTensor)
        own = tensor.to_local() if sharded else tensor
        for name, more in (("tensors", 1), ("sharded", sharded), ("own", own.numel()), ("whole", tensor.numel())):
            found[name] += more

    for name, parameter in trainer.wrapped.named_parameters():
        language = "LoRA" if "lora_" in name else "frozen language model"
        count("projector" if "feature_proj" in name else "encoder" if "encoder" in name else language, parameter)
    for moments in trainer.optimizer.state.values():
        for tensor in (moments["exp_avg"], moments["exp_avg_sq"]):
            count("optimizer state", tensor)
    return groups


def watch_gathered(trainer):
    """The numbers of decoder layers that are whole while the first one computes."""
    layers, seen = trainer.model.language_model.model.layers, set()

    def note(*_):
        seen.add(sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers))

    layers[0].mlp.register_forward_hook(note)
    return seen


def run(case):
    """How the run ended: its last folder, a sentence, or an exit status."""
    AcceleratorState._reset_state()
    state.PROVENANCE_FILE = "nowhere" if case.get("own disk") and RANK else "provenance.json"
    config = Config.model_validate(case["config"])
    if RANK and "other captions" in case:
        config.data.captions = case["other captions"]
    try:
        with lost_processes():
            if config.train.stages:
                return {"folder": str(train_stages(config, case))}
            trainer = Trainer(config, case.get("resume"))
            if "fault" in case and int(os.environ["WORLD_SIZE"]) - 1 == RANK:
                FAULTS[case["fault"]](trainer)
            gathered = watch_gathered(trainer)
            folder = trainer.run()
    except UserError as error:
        return {"error": str(error)}
    except SystemExit as error:
        return {"exit": error.code}
    setting = trainer.setting
    result = {"folder": str(folder), "setting": [setting.micro_batch, setting.accumulation, setting.checkpointing]}
    return result | ({"held": held(trainer), "gathered": list(gathered)} if config.train.shard else {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    # torchrun ends the processes that are left with SIGTERM, which must not come before the result is written
    signal.signal(signal.SIGTERM, lambda *_: None)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        result = run(case)
        (Path(sys.argv[2]) / f"{case['name']}-{RANK}.json").write_text(json.dumps(result))
