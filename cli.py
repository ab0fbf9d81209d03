"""What all scripts share: their arguments, and how their errors reach the user."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable

from errors import UserError

# peft imports bitsandbytes wherever it is installed. On a CPU with bf16 that complains that a kernel from the hub is
# missing, which we never use (`qwen/loading.py`). Scripts import this module first, so the filter is there in time.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def script_arguments(description: str, default_config: str | None = "config.yaml") -> argparse.ArgumentParser:
    """The argument parser of a script: `--config FILE` (unless it takes a checkpoint), `--debug` and overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if default_config is not None:
        parser.add_argument("--config", default=default_config, help=f"YAML file of the run (default {default_config})")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replace config values, for example train.max_steps=100"
    )
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError` becomes one sentence on stderr and exit status 1, with `--debug` after its traceback; Ctrl-C ends with
    status 130. Any other error is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # do not crash if the console cannot encode a character
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
