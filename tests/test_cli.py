"""How errors, warnings and paths of a script reach its user; each script of these tests runs in its own process."""

import io
import os
import subprocess
import sys
import warnings

from cli import run_script, script_arguments

import pytest

from config import load_config
from errors import is_out_of_memory, shortened
from paths import REPO_ROOT

SCRIPT = """
import cli
{imports}

def main():
    {body}

cli.run_script(main)
"""


def run(body, *arguments, imports="", python=()):
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    return subprocess.run(
        [sys.executable, *python, "-c", SCRIPT.format(imports=imports, body=body), *arguments],
        cwd=REPO_ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


USER_ERROR = "raise UserError('no such thing: make one')"


def test_a_user_error_is_one_sentence():
    done = run(USER_ERROR, imports="from errors import UserError")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no such thing: make one\n")


def test_debug_shows_the_traceback_and_the_sentence():
    done = run(USER_ERROR, "--debug", imports="from errors import UserError")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("\nerror: no such thing: make one\n")


@pytest.mark.parametrize("error", ["ValueError('ours')", "OSError(28, 'No space left')", "RuntimeError('shapes')"])
def test_a_defect_keeps_its_traceback(error):
    done = run(f"raise {error}")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "in main" in done.stderr
    assert not done.stderr.splitlines()[-1].startswith("error:")


def test_ctrl_c_ends_quietly_with_130():
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "")


def test_out_of_memory_is_one_sentence():
    done = run("raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: you tried\\nmore')")
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory: close other programs")
    assert done.stderr.count("\n") == 1


def test_an_illegal_memory_access_is_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))
    for text in ("CUDA error: out of memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(MemoryError())


def test_chatter_of_libraries_is_hidden_from_users():
    body = "warnings.warn('old', FutureWarning); transformers.utils.logging.get_logger('transformers.x').warning('new')"
    assert run(body, imports="import warnings, transformers").stderr == ""
    late = run("import transformers; transformers.utils.logging.get_logger('transformers.x').warning('new')")
    assert late.stderr == ""
    assert "old" in run(body, imports="import warnings, transformers", python=["-W", "default"]).stderr
    assert "mind this" in run("warnings.warn('mind this')", imports="import warnings").stderr


def test_missing_packages_are_said(tmp_path):
    for name in ("train.py", "predict.py", "test_gui.py", "export.py", "eval_vqa.py", "process_image.py"):
        # -S and -I: a Python without installed packages
        done = subprocess.run(
            [sys.executable, "-S", "-E", str(REPO_ROOT / name)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, name
        assert done.stderr.startswith("error: the packages of requirements.txt are not installed"), (name, done.stderr)
        assert done.stderr.count("\n") == 1


def test_a_typed_config_counts_from_the_working_directory_and_then_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("visual: {path: mine}\nllm: {path: l}")
    (tmp_path / "config.yaml").write_text("visual: {path: theirs}\nllm: {path: l}")
    parser = script_arguments("test")

    def visual(*arguments):
        return load_config(parser.parse_args(arguments).config).visual.path

    assert visual("--config", "my.yaml") == "mine"
    assert visual("--config", "config.yaml") == "theirs"
    assert visual("--config", "configs/demo.yaml") == "demo/backbones/siglip"
    assert visual() == "google/siglip-so400m-patch14-384"  # untyped: the repository's, whatever stands here
    assert "count from the working directory" in " ".join(parser.format_help().split())


def test_long_values_are_cut_in_messages():
    assert shortened("a" * 300) == "a" * 99 + "…" + "a" * 99
    assert shortened("short") == "short"


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
def test_a_deprecated_call_in_our_code_fails_the_tests(kind):
    with pytest.raises(kind, match="old"):
        warnings.warn_explicit("old", kind, "model/model.py", 1, module="model.model")
    with pytest.warns(kind, match="old"):
        warnings.warn_explicit("old", kind, "x.py", 1, module="transformers.modeling_utils")


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run_script(lambda: print("∎"))
    assert sys.stdout.getvalue() == "∎\n"
