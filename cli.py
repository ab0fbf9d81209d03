"""Command-line arguments and error messages of all scripts.

Each script imports this module before any installed package.
"""

import argparse
import importlib.util
import io
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
KEY_VARIABLE = "VQA_API_KEY"
OUT_OF_MEMORY = (
    "out of memory: close other programs on this device, take a smaller model or llm.quantization=nf4, or shorten the "
    "text (generate.max_new_tokens) ({})"
)

# peft imports bitsandbytes if it is installed. On a CPU with bf16, bitsandbytes warns about a missing kernel from the
# hub, which we never use (`qwen/loading.py`). Scripts import this module first, so the filter is set in time.
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`, and the options of a server that is asked instead."""
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask an OpenAI-compatible server instead of a checkpoint: http://127.0.0.1:8000/v1",
    )
    parser.add_argument("--model", metavar="NAME", help="for --server: its model (default the only one it has)")
    add_key_option(parser, "for --server: its API key")


def add_key_option(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"{meaning}; the environment variable {KEY_VARIABLE} does the same, unseen by ps",
    )


def read_key(args: argparse.Namespace) -> str | None:
    """Return the API key of the command line, or of the environment; None without one."""
    if args.api_key == "":
        raise UserError("--api-key is empty: give a key, or leave the option out")
    return args.api_key or os.environ.get(KEY_VARIABLE) or None


def check_model_options(args: argparse.Namespace) -> None:
    """Raise UserError unless exactly one of `--checkpoint` and `--server` is given, each with its own options."""
    if (args.checkpoint is None) == (args.server is None):
        raise UserError("give either --checkpoint DIR, or --server URL to ask a server")
    if args.server is None and (args.model is not None or args.api_key is not None):
        raise UserError("--model and --api-key belong to --server: give that too, or leave them out")


def _typed_config(text: str) -> Path:
    """Return the file in the working directory if it exists, else the typed path, relative to the repository."""
    return Path(text).absolute() if os.path.exists(text) else Path(text)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError` or lack of memory gives one sentence on stderr and exit status 1; `--debug` adds the traceback.
    Ctrl-C gives status 130. Any other error is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # do not crash if the console cannot encode a character
        if isinstance(stream, io.TextIOWrapper):  # a notebook, or a program without a console, has other types
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
    """Hide library warnings: users cannot act on them, and they make errors hard to find.

    Tests show all of them. `python -W default` and TRANSFORMERS_VERBOSITY enable them again.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        # peft assumes a resized embedding and warns that it saves it; our embedding is never trained
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    # transformers reads the variable at import, and some scripts import it in main. Its notices (resized embeddings,
    # unused generation settings) concern deliberate choices of this project.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        # on CPUs with AVX512-BF16, bitsandbytes misses a package for 4-bit products, also where nothing is in 4 bits
        for name in ("transformers", "peft", "bitsandbytes"):
            logging.getLogger(name).setLevel(logging.ERROR)
