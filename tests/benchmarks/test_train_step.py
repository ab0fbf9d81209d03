"""The benchmark of a training step says which side the system ended."""

import argparse

import pytest

from benchmarks.train_sides import DEMO
from benchmarks.train_step import Side


def test_a_side_that_dies_is_named():
    options = argparse.Namespace(
        threads=1, device="cpu", precision="float32", photos=1, checkpointing=False, compile=False, dropout=0.0
    )
    side = Side("peft_lora", DEMO, options, 1)
    side.process.kill()
    side.process.join()
    with pytest.raises(SystemExit, match="'peft_lora' ended with exit code -9"):
        side.receive()
