"""The whole page: puts its panels together, and serves it. Called by `test_gui.py`."""

import os
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.route_utils import FnIndexInferError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config import Generate, Gui
from page.address import in_url
from page.api import add_endpoints
from page.asking import Shared
from page.batch_tab import BatchTab
from page.beside import BesidePanel
from page.chat_tab import ChatTab
from page.checkpoints import Engines
from page.examples import examples_panel
from page.kept_panel import KeptPanel
from page.looking import LookingPanel, PartPanel
from page.sessions import forget_closed, forget_removed, keep_component_numbers, name_uploads_apart
from page.settings import checkpoint_choice, settings_panel
from page.texts import TEXTS, label, translations
from page.uploads import SessionFiles

# Gradio's are too pale: WCAG 2.1 wants 4.5:1 between a text and what is behind it
GREY = {"": "*neutral_600", "_dark": "*neutral_300"}
PALE = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "input_placeholder_color")
COLOURS = {name + mode: grey for name in PALE for mode, grey in GREY.items()} | {
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_dark": "*primary_600",
}

HERE = Path(__file__).resolve().parent
KEEP_SECONDS = 3600  # how long an upload is kept after its last use, if its session goes on
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]  # present on most systems


def build_page(
    engines: Engines, generate: Generate, folder: Path, samples: dict[str, bytes] | None = None
) -> gr.Blocks:
    """Build the page.

    Args:
        generate: start values of the settings.
        folder: of uploads and all that the page shows; Gradio's GRADIO_TEMP_DIR.
        samples: photos to try, by file name.
    """
    shared = Shared(engines, generate, SessionFiles(folder))
    with gr.Blocks(
        title=TEXTS["title"][0],
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS // 6, KEEP_SECONDS),
    ) as page:
        with gr.Row():
            with gr.Column(scale=9, min_width=200, elem_id="title"):
                gr.Markdown(label("title_line"))
            switch = gr.Button(label("switch"), size="sm", scale=1, min_width=80, elem_id="language")
            switch.click(None, js="() => vqa.switch_language()")
        with gr.Tabs():
            with gr.Tab(label("chat")), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    chat = ChatTab(shared)
                    examples_panel(chat.question, samples or {}, shared)
                with gr.Column(scale=3, min_width=320):
                    checkpoint = checkpoint_choice(engines)
                    part = PartPanel()
                    looking = LookingPanel(chat, shared)
                    beside = BesidePanel(chat, shared)
                    kept = KeptPanel(chat, shared)
                    settings = settings_panel(generate)
            with gr.Tab(label("batch_tab")):
                batch = BatchTab(shared)
        changes = [*chat.connect(checkpoint, settings, part.box), *kept.connect(page, checkpoint)]
        part.connect(changes, chat, shared)
        looking.connect(changes, checkpoint, settings)
        beside.connect(page, settings)
        batch.connect(checkpoint, settings)
        add_endpoints(shared)

        def on_unload(request: gr.Request) -> None:
            shared.end(request.session_hash or "")
            forget_closed(page.state_holder)
            forget_removed(page.temp_file_sets)

        page.unload(on_unload)
    return page


def launch(page: gr.Blocks, gui: Gui) -> None:
    """Serve the page on `gui.host`:`gui.port` in background threads; return when it is ready."""
    for variable in ("no_proxy", "NO_PROXY"):  # Gradio requests its own page once, which fails through a proxy
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "localhost", gui.host]))
    keep_component_numbers()
    name_uploads_apart()
    # calls that bypass the queue could take all threads, and those of the line wait for one to go on
    page.queue(default_concurrency_limit=4, api_open=False).launch(
        server_name=in_url(gui.host),
        server_port=gui.port,
        root_path=gui.root_path,
        auth=(gui.user, gui.password) if gui.user else None,
        max_file_size=f"{gui.max_upload_mb}mb",
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"]).set(**COLOURS),
        css=(HERE / "style.css").read_text(encoding="utf-8"),
        i18n=translations(),
        app_kwargs={
            "middleware": [Middleware(FirstScript, (HERE / "browser.js").read_bytes())],
            "exception_handlers": {FnIndexInferError: no_such_endpoint},
        },
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )


async def no_such_endpoint(request: Request, error: Exception) -> Response:
    """Refuse a call of an unknown endpoint, for which Gradio has a traceback and status 500."""
    return JSONResponse({"detail": "there is no such endpoint: docs/page.md names them"}, 404)


class FirstScript:
    """ASGI middleware that puts a script before all others of a page; Gradio's `head` comes after its own."""

    def __init__(self, app: ASGIApp, script: bytes) -> None:
        self._app, self._script = app, b"<head><script>" + script + b"</script>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        body = b""

        async def send_changed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_page(message["headers"]):
                start = message
            elif message["type"] == "http.response.body" and start is not None:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    body = body.replace(b"<head>", self._script, 1)
                    start["headers"] = [
                        (name, value if name != b"content-length" else str(len(body)).encode())
                        for name, value in start["headers"]
                    ]
                    await send(start)
                    await send({"type": "http.response.body", "body": body})
            else:
                await send(message)

        await self._app(scope, receive, send_changed if scope["type"] == "http" else send)


def _is_page(headers: list[tuple[bytes, bytes]]) -> bool:
    kinds: dict[bytes, Any] = dict(headers)
    return kinds.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in kinds
