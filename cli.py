"""What all scripts share: their arguments, and how their errors reach the user.

The scripts import it before anything that has to be installed.
"""

import argparse
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from errors import UserError, is_out_of_memory, shortened

if importlib.util.find_spec("torch") is None:  # checked here, because the scripts import torch next
    raise SystemExit(
        "error: the packages of requirements.txt are not installed for this Python. Run `python tasks.py demo`, which "
        r"makes .venv, or activate it: `source .venv/bin/activate`, on Windows `.venv\Scripts\activate`"
    )

PATHS = """Relative paths typed as options count from the working directory (--config also from the repository
root), those in configs and key=value from the repository root."""
OUT_OF_MEMORY = (
    "out of memory: close other programs on this device, take a smaller model or llm.quantization=nf4, or shorten the "
    "text (generate.max_new_tokens) ({})"
)

# peft imports bitsandbytes wherever it is installed. On a CPU with bf16 that complains that a kernel from the hub is
# missing, which we never use (`qwen/loading.py`). Scripts import this module first, so the filter is there in time.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def script_arguments(description: str, default_config: str | None = "config.yaml") -> argparse.ArgumentParser:
    """The argument parser of a script: `--config FILE` (unless it takes a checkpoint), `--debug` and overrides."""
    parser = argparse.ArgumentParser(
        description=description, epilog=PATHS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if default_config is not None:
        parser.add_argument(
            "--config",
            type=_typed_config,
            default=Path(default_config),  # not a string: argparse would pass a string through `_typed_config`
            metavar="FILE",
            help=f"YAML file of the run (default {default_config} of the repository)",
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replace config values, for example train.max_steps=100"
    )
    return parser


def _typed_config(text: str) -> Path:
    """The file in the working directory if it exists, else the path as typed, which counts from the repository."""
    return Path(text).absolute() if os.path.exists(text) else Path(text)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError` becomes one sentence on stderr and exit status 1, with `--debug` after its traceback; so does a lack
    of memory. Ctrl-C ends with status 130. Any other error is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # do not crash if the console cannot encode a character
        stream.reconfigure(errors="backslashreplace")
    _quieten_libraries()
    try:
        main()
    except UserError as error:
        _end(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).splitlines() or ["no details"]
        _end(OUT_OF_MEMORY.format(shortened(lines[0])))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end(sentence: str) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    raise SystemExit(f"error: {sentence}") from None


def _quieten_libraries() -> None:
    """Hide what libraries tell developers: users cannot act on it, and errors would be hard to find among it.

    Tests show all of it. `python -W default` and TRANSFORMERS_VERBOSITY bring it back.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        # peft warns that it saves an embedding which it takes for resized; ours is never trained
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    # Read when transformers is imported, which some scripts do in main; its notices (resized embeddings, unused
    # settings of a generation) are about decisions this project made.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        for name in ("transformers", "peft"):
            logging.getLogger(name).setLevel(logging.ERROR)
