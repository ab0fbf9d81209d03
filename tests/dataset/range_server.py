"""A web server of a folder that gives ranges of bytes, and that can be told to fail. Used by `test_web_shards.py`."""

import contextlib
import functools
import http.server
import re
import threading
import time
from pathlib import Path


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, whole or in ranges of bytes, as web servers and stores give them."""

    def do_HEAD(self):
        if not self.refused():
            super().do_HEAD()

    def refused(self):
        """Whether this request is one that fails; it is answered then."""
        if self.server.answering and not self.server.failures:
            return False
        self.server.failures = max(self.server.failures - 1, 0)
        self.send_error(self.server.status)
        return True

    def do_GET(self):
        if self.refused():
            return
        file = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not self.server.gives_ranges or not file.is_file():
            super().do_GET()
            return
        if int(asked[1]) >= file.stat().st_size:
            self.send_error(416)
            return
        time.sleep(self.server.silent)
        content = file.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serve the folder at `url`; the attributes that are set here say how it answers."""
    handler = type("Handler", (RangeServer,), {})  # of its own, so that a test can change it
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder.parent)
    ) as running:
        running.handler, running.folder = handler, folder
        running.url = f"http://127.0.0.1:{running.server_port}/{folder.name}"
        running.asked, running.gives_ranges = [], True
        running.failures, running.answering, running.status = 0, True, 503  # so many requests fail, or all
        running.silent = 0  # seconds before an answer
        running.handle_error = lambda *_: None  # a client that gave up is no fault of the server
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
