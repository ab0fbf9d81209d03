"""`train.precision: auto` on every kind of CPU, and how the suite hides what this one can do."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from errors import UserError
from model import precision
from model.checkpoint import load_checkpoint
from model.precision import cpu_has_bf16, pick_precision
from paths import REPO_ROOT
from tasks import CPU_LINE, WITHOUT_BF16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("onednn", "capabilities", "expected"),
    [
        (True, {"avx512_f": True, "avx512_bf16": True}, "bf16"),
        (True, {"amx_bf16": True}, "bf16"),
        (True, {"bf16": True}, "bf16"),  # ARM
        (True, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),  # oneDNN emulates it
        (False, {"avx512_bf16": True}, "float32"),  # hidden
    ],
)
def test_auto_is_bf16_where_the_cpu_has_it(onednn, capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("bf16", CPU) == "bf16"
    assert pick_precision("float32", CPU) == "float32"


@pytest.mark.parametrize("has_bf16", [False, True])
def test_answering_is_float32_on_a_cpu_unless_told_otherwise(has_bf16, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)

    def dtypes(**overrides):
        root = {"model_root": tiny_checkpoint.parent.parent}
        model = load_checkpoint(tiny_checkpoint, "cpu", overrides=root | overrides)
        return {parameter.dtype for parameter in model.parameters()}

    best = torch.bfloat16 if has_bf16 else torch.float32
    assert dtypes() == {torch.float32}
    assert dtypes(**{"train.precision": "auto"}) == {best}
    assert dtypes(**{"train.precision": "bf16"}) == {torch.bfloat16}
    monkeypatch.setattr(precision, "has_fp16_product", lambda: False)
    with pytest.raises(UserError, match=r"'train\.precision': on a CPU, fp16 needs an x86 build of torch; use auto"):
        dtypes(**{"train.precision": "fp16"})


def test_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_has_bf16()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the variables are for x86")
def test_bf16_can_be_hidden_and_the_kind_of_cpu_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", CPU_LINE],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | WITHOUT_BF16,
    )
    assert done.stdout.startswith("CPU: ")
    assert ", bf16 no, amx " in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
