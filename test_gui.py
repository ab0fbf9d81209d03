"""Web page to ask a checkpoint about photos; each question may come with one or several.

    python test_gui.py --checkpoint checkpoints/demo/checkpoint-240
    python test_gui.py --checkpoint DIR gui.port=8000 gui.max_upload_mb=50
    python test_gui.py --checkpoint DIR gui.host=0.0.0.0 gui.user=NAME     # password: environment VQA_GUI_PASSWORD
    python test_gui.py --server http://127.0.0.1:8000/v1

Only this machine can open the page (gui.host=0.0.0.0 lets others in). It answers one question at a time and fetches
nothing from the network. Uploaded photos stay in a temporary folder until their chat or its browser tab is closed, at
most until an hour after their last use or until the page ends. The page opens no other file of the disk. With --server,
an OpenAI-compatible server gets the photos. docs/page.md tells what the page can do.
"""

import io
import os
import signal
import sys

from cli import add_model_options, check_model_options, run_script, script_arguments

import numpy as np

from answering.answer import Answerer
from answering.remote import connect
from config import Gui, changed, parse_overrides
from demo.world import draw, random_scene
from errors import UserError
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import read_config
from page.address import check_port, in_url
from page.checkpoints import Engines
from page.uploads import upload_folder

PASSWORD_VARIABLE = "VQA_GUI_PASSWORD"
SAMPLE_SEEDS = (3, 7, 11)


def sample_photos() -> dict[str, bytes]:
    """Draw scenes of the demo's world, to try the page without a photo of one's own; by file name."""
    photos = {}
    for number, seed in enumerate(SAMPLE_SEEDS, start=1):
        rng = np.random.default_rng(seed)
        file = io.BytesIO()
        draw(random_scene(rng), rng).save(file, "PNG")
        photos[f"sample-{number}.png"] = file.getvalue()
    return photos


def with_password(gui: Gui) -> Gui:
    """Take the password of the environment, unless one is set.

    Raises:
        UserError: a user without a password, or a password without a user.
    """
    password = gui.password or os.environ.get(PASSWORD_VARIABLE)
    if gui.user is None:
        if password or gui.password is not None:  # else the page would be open to all
            name = PASSWORD_VARIABLE if gui.password is None else "gui.password"
            raise UserError(f"{name} needs gui.user: set both, or none")
        return gui
    if not password:
        raise UserError(f"gui.user needs a password: set the environment variable {PASSWORD_VARIABLE}")
    return changed(gui, {"password": password}, PASSWORD_VARIABLE)


def end_on_signals() -> None:
    """Raise SystemExit on SIGTERM and when the terminal is closed, so that the uploads are removed."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    add_model_options(parser)
    args = parser.parse_intermixed_args(arguments)
    check_model_options(args)
    overrides = parse_overrides(args.overrides)
    if args.server is not None:
        remote, config = connect(args, overrides, "gui")
        gui, generate = with_password(config.gui), config.generate
        check_port(gui)
        engines = Engines(remote, f"{remote.name} · {remote.url}")
    else:
        checkpoint = args.checkpoint.absolute()
        gui = with_password(read_config(checkpoint, overrides).gui)
        check_port(gui)  # before the model is loaded, which may take a minute
        model = load_checkpoint(checkpoint, overrides=overrides)
        generate = model.config.generate
        engines = Engines(Answerer(model), checkpoint.name, checkpoint, overrides)
    end_on_signals()
    with upload_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        from page.build import build_page, launch  # imports gradio, which creates this folder

        page = build_page(engines, generate, uploads, sample_photos())
        launch(page, gui)
        host = in_url(gui.host)
        print(f"Open http://{host}:{gui.port} in a browser; Ctrl-C ends it.")
        print(f"From another machine: ssh -L {gui.port}:{host}:{gui.port} THIS_MACHINE", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run_script(main)
