"""A server with answers that a test writes, in place of one that speaks the protocol by itself."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def scripted(*answers):
    """A server with these answers, the last one for ever: (status, headers, body), and "cut" to break off after it.

    An answer may be a function of the fields that were sent.
    """
    asked, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.path, dict(self.headers), json.loads(body or "null")))
            answer = left.pop(0) if len(left) > 1 else left[0]
            status, headers, content, *cut = answer(asked[-1][2]) if callable(answer) else answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content.encode()) + len(cut)))
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def events(*contents):
    return "".join(f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n" for content in contents)


def delta(content=None, reason=None):
    return {"choices": [{"delta": {"content": content}, "finish_reason": reason}]}


def refusal(message, **more):
    return json.dumps({"error": {"message": message} | more})


def whole(text):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "content_filter"}], "more": 1})


WHOLE = whole("yes")
