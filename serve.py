"""Answer questions about photos over HTTP, by OpenAI's protocol, with a checkpoint.

    python serve.py --checkpoint checkpoints/demo/checkpoint-240
    curl http://127.0.0.1:8000/v1/models

Any client of that protocol can ask: its base URL is http://127.0.0.1:8000/v1, the model's name that of the checkpoint
folder. Photos are sent as data URLs; nothing is fetched from the network. Only this machine can connect, unless --host
says otherwise; then give a key too. One request is answered at a time. See docs/serving.md.
"""

import os
import signal
from pathlib import Path
from types import FrameType

from cli import add_key_option, read_key, run_script, script_arguments

import uvicorn

from config import Gui, changed, parse_overrides
from errors import UserError, shortened
from page.address import check_port, in_url
from serving.gate import Limits, allowed_hosts


class EndingServer(uvicorn.Server):
    """A server that a signal ends at once, also in the middle of a token; it has no files to put away."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        print("The server has ended; answers that were not finished are cut off.", flush=True)
        os._exit(130 if sig == signal.SIGINT else 0)


def main(arguments: list[str] | None = None) -> None:
    args = read_arguments(arguments)
    key = read_key(args)
    checkpoint = args.checkpoint.absolute()
    gui = changed(Gui(), {"host": args.host, "port": args.port}, "--host or --port")
    check_port(gui, "--{} ")  # before the model is loaded, which may take a minute

    from answering.answer import Answerer
    from model.checkpoint import load_checkpoint
    from serving.app import Service, build_app

    model = load_checkpoint(checkpoint, overrides=parse_overrides(args.overrides))
    limits = Limits(
        key=key,
        hosts=allowed_hosts(args.host, key),
        queue=args.max_queue,
        request_bytes=args.max_request_mb * 2**20,
        pixels=args.max_megapixels * 10**6,
    )
    created = int(checkpoint.stat().st_mtime)
    service = Service(Answerer(model), checkpoint.name, model.config.generate, limits, created, args.allow_files)
    print(f"Serving '{service.name}' at http://{in_url(args.host)}:{args.port}/v1; Ctrl-C ends it.", flush=True)
    settings = uvicorn.Config(
        build_app(service), args.host, args.port, log_level="warning", access_log=False, server_header=False, ws="none",
        lifespan="off",
    )  # fmt: skip
    EndingServer(settings).run()


def read_arguments(arguments: list[str] | None):
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: only this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000)")
    add_key_option(parser, "ask clients for this key")
    parser.add_argument(
        "--max-queue", type=int, default=Limits.queue, metavar="N",
        help=f"requests that may wait (default {Limits.queue}); more are refused with status 429",
    )  # fmt: skip
    megabytes = Limits.request_bytes // 2**20
    parser.add_argument(
        "--max-request-mb", type=int, default=megabytes, metavar="MIB", help=f"size of a request (default {megabytes})"
    )
    megapixels = Limits.pixels // 10**6
    parser.add_argument(
        "--max-megapixels", type=int, default=megapixels, metavar="N",
        help=f"pixels of all photos of a request together (default {megapixels})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-files", type=Path, metavar="DIR", help="clients may name photos in this folder as file:///… URLs"
    )
    args = parser.parse_intermixed_args(arguments)
    for option, least in {"max_queue": 0, "max_request_mb": 1, "max_megapixels": 1}.items():
        value = getattr(args, option)
        if not least <= value <= 10**6:
            raise UserError(f"--{option.replace('_', '-')} must be from {least} to 1000000, found {value}")
    if args.allow_files is not None and not args.allow_files.is_dir():
        raise UserError(f"--allow-files: {shortened(args.allow_files)} is not a folder")
    return args


if __name__ == "__main__":
    run_script(main)
