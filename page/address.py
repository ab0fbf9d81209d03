"""Check of an address before the model is loaded. Called by `test_gui.py` and `serve.py`."""

import os
import socket

from config import Gui
from errors import UserError, shortened


def in_url(host: str) -> str:
    """Return `host`, with an IPv6 address in brackets as in URLs; Gradio removes them again."""
    return f"[{host}]" if ":" in host else host


def check_port(gui: Gui, option: str = "gui.{}=") -> None:
    """Check that the page can be served, by IPv4 or IPv6.

    Args:
        option: how host and port are set, for the message.

    Raises:
        UserError: `gui.host`:`gui.port` is taken or cannot be used.
    """
    try:
        addresses = socket.getaddrinfo(gui.host, gui.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{shortened(gui.host)} is no address of this machine ({error}): set {option.format('host')}127.0.0.1, or "
            "0.0.0.0 for all other machines"
        ) from error
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # on Windows, two programs could share the port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise UserError(
                f"cannot serve on {in_url(gui.host)}:{gui.port} ({error.strerror}): choose another port, for example "
                f"{option.format('port')}{gui.port % 65535 + 1}"
            ) from error
