"""A web page to ask a checkpoint about photos.

    python test_gui.py --checkpoint checkpoints/demo/checkpoint-240
    python test_gui.py --checkpoint DIR gui.port=8000 gui.max_upload_mb=50

Only this machine can open the page (gui.host=0.0.0.0 lets others in). It answers one question at a time and fetches
nothing from the network. Uploaded photos stay in a temporary folder until an hour after their last use, or until the
page ends. The page opens no other file of the disk.
"""

import contextlib
import functools
import html
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import run_script, script_arguments

from answering.answer import Answerer
from config import Generate, Gui, changed, parse_overrides
from errors import UserError, check_text, is_out_of_memory
from model.checkpoint import load_checkpoint, read_config
from page.address import check_port, in_url
from page.uploads import photo_name, upload_folder, uploaded_photo
from visual.transform import load_image

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

History = list[dict[str, str]]  # {"role": "user" | "assistant", "content": text} in turn

EXAMPLES = [
    "What is in the picture?",
    "How many objects are there?",
    "Describe the picture.",
    "这幅图像中有什么？",
    "这幅图像描述了什么？",
]
HELLO = "<center>Choose a photo, then ask<br>先选照片，再提问</center>"
DROP = "Drop, paste or choose a photo\n拖入、粘贴或选择照片"
NO_PHOTO = "No photo yet: choose one first. 还没有照片，请先选择一张。"
NO_QUESTION = "The question is empty: type one first. 问题是空的，请先输入问题。"
NO_ANSWER = "There is no answer to repeat yet. 还没有可以重答的内容。"
SAME_ANSWER = "At temperature 0 the answer stays the same. 温度为 0 时回答不会改变。"
WORKING = "Looking at the photo… 正在看图……"
NEW_PHOTO = "New photo, new chat. 新照片，新对话。"
NOTHING = "(no answer 无回答)"
STOPPED = "Stopped. 已停止。"
OUT_OF_MEMORY = (
    "Out of memory: lower 'Longest answer', press Clear for a shorter chat, close other programs on this device, "
    "or load a smaller model. 内存不足：请调小“最长回答”，清空对话，关闭占用同一设备的其他程序，或换用更小的模型。"
)
REFRESH_SECONDS = 0.05  # the page is redrawn at most this often while an answer grows
KEEP_SECONDS = 3600  # how long an upload is kept after its last use

FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]  # what machines have anyway
CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto !important}
#title h1 {margin: 0; font-size: 1.5rem}
#title p {margin: 0; opacity: .7}
#status {min-height: 1.5em; opacity: .75}
footer {display: none !important}
@media (max-width: 640px) {
  #title h1 {font-size: 1.2rem}
  #photo {height: 300px !important}
  #ask, #stop, #again, #clear {font-size: .8rem !important; padding: 8px 2px !important; white-space: nowrap !important}
}
"""


def build_page(answerer: Answerer, generate: Generate, name: str) -> "gr.Blocks":
    """The page: photo and settings on the left, chat on the right.

    Args:
        answerer: answers; its `settings` are set before each question.
        generate: start values of the settings.
        name: of the checkpoint, shown under the title.
    """
    import gradio as gr  # when it is imported it makes its folder for uploads, so main must have named one

    active: set[str | None] = set()  # sessions whose answer is being made
    decoded = functools.lru_cache(maxsize=4)(load_image)  # each upload has its own path; follow-ups decode nothing
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])

    def load(upload: Any) -> "Image.Image":
        return decoded(uploaded_photo(upload, uploads))

    with gr.Blocks(
        title="Ask about a photo 看图问答",
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS // 6, KEEP_SECONDS),
    ) as page:
        gr.Markdown(f"# Ask about a photo 看图问答\n`{name}`", elem_id="title")
        messages = gr.State([])  # what the model is sent; the chat shows the same, and failed questions
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                photo = gr.Image(
                    label="Photo 照片", placeholder=DROP, height=460, elem_id="photo", buttons=["fullscreen"]
                )
                with gr.Accordion("Settings 设置", open=False):
                    limit, label = max(1024, generate.max_new_tokens), "Longest answer, tokens 最长回答（词元）"
                    longest = gr.Slider(1, limit, generate.max_new_tokens, step=1, label=label)
                    label, info = "Temperature 温度", "0: always the likeliest word 总选最可能的词"
                    temperature = gr.Slider(0, 2, generate.temperature, step=0.05, label=label, info=info)
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    label="Chat 对话",
                    height=420,
                    elem_id="chat",
                    placeholder=HELLO,
                    buttons=["copy_all"],
                    render_markdown=False,
                    latex_delimiters=[],
                )
                status = gr.Markdown("", elem_id="status")
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False,
                        container=False,
                        placeholder="Question 问题",
                        lines=1,
                        max_lines=4,
                        scale=5,
                        min_width=200,
                        elem_id="question",
                    )
                    ask = gr.Button("Ask 提问", variant="primary", scale=1, min_width=100, elem_id="ask")
                with gr.Row():
                    stop = gr.Button("Stop 停止", interactive=False, min_width=90, elem_id="stop")
                    again = gr.Button("Retry 重答", min_width=90, elem_id="again")
                    clear = gr.Button("Clear 清空", min_width=90, elem_id="clear")
                gr.Examples(EXAMPLES, question, label="Examples 示例", elem_id="examples")

        def show(history: History, line: str, busy: bool) -> dict[Any, Any]:
            return {
                messages: history,
                chat: _as_shown(history),
                status: line,
                ask: gr.update(interactive=not busy),
                again: gr.update(interactive=not busy),
                stop: gr.update(interactive=busy),
            }

        def complain(sentence: str) -> dict[Any, Any]:
            sentence = html.escape(sentence, quote=False)  # it may hold the name of the user's file
            gr.Warning(sentence)
            return {status: sentence}

        def answer(session: str | None, history: History, upload: Any, settings: dict[str, Any]):
            """Stream the answer to the last question of `history`."""
            asked, text, line = history[-1]["content"], "", ""
            try:
                active.add(session)
                yield show(history, WORKING, busy=True) | {question: ""}
                check_text(asked, "the question 问题")
                answerer.settings = changed(generate, settings, "settings 设置")
                for text, line in _timed(answerer.stream(load(upload), history)):
                    yield show([*history, {"role": "assistant", "content": text}], line, busy=True)
                yield show([*history, {"role": "assistant", "content": text}], line, busy=False)
            except Exception as error:  # any error is shown in the chat, and the page stays usable
                failed = [*history, {"role": "assistant", "content": f"⚠ {_sentence(error, upload)}"}]
                yield show(history[:-1], "", busy=False) | {chat: _as_shown(failed), question: asked}
                if not isinstance(error, UserError) and not is_out_of_memory(error):
                    raise
            finally:
                active.discard(session)

        def settle(session: str | None) -> None:
            """Wait for a cancelled answer to end: what it still sends must not reach the page after our own update."""
            while session in active:
                time.sleep(0.02)

        def on_ask(history, upload, text, longest, temperature, request: gr.Request):
            if upload is None or not isinstance(text, str) or not text.strip():
                yield complain(NO_PHOTO if upload is None else NO_QUESTION)
                return
            history = [*_answered(history), {"role": "user", "content": text.strip()}]
            settings = {"max_new_tokens": longest, "temperature": temperature}
            yield from answer(request.session_hash, history, upload, settings)

        def on_again(history, upload, longest, temperature, request: gr.Request):
            history = _answered(history)
            if upload is None or not history:
                yield complain(NO_PHOTO if upload is None else NO_ANSWER)
                return
            if temperature == 0:
                gr.Info(SAME_ANSWER)
            settings = {"max_new_tokens": longest, "temperature": temperature, "seed": time.time_ns() % 2**31}
            yield from answer(request.session_hash, history[:-1], upload, settings)

        def on_stop(history, request: gr.Request):
            settle(request.session_hash)
            unanswered = history[len(_answered(history)) :]  # stopped before the first word: the question goes back
            back = {question: unanswered[0]["content"]} if unanswered else {}
            return show(_answered(history), STOPPED, busy=False) | back

        def on_clear(request: gr.Request):
            settle(request.session_hash)
            return show([], "", busy=False)

        def on_photo(history, upload, request: gr.Request):
            settle(request.session_hash)
            if upload is not None:
                try:
                    load(upload)
                except UserError as error:
                    return show([], "", busy=False) | {photo: None} | complain(_sentence(error, upload))
            if history:
                return show([], NEW_PHOTO if upload is not None else "", busy=False)
            return {messages: []}  # keeps the line that says why a broken photo was refused

        outputs = [messages, chat, status, question, ask, again, stop, photo]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        # preprocess=False: Gradio would decode the photo itself, and meet a broken file with a traceback
        inputs = [messages, photo, question, longest, temperature]
        asking = gr.on([ask.click, question.submit], on_ask, inputs, outputs, preprocess=False, **one_at_a_time)
        inputs = [messages, photo, longest, temperature]
        repeating = again.click(on_again, inputs, outputs, preprocess=False, **one_at_a_time)
        # listeners run in this order, so the cancelling ones stand before those that wait for the end in settle
        gr.on([photo.change, stop.click, clear.click, chat.clear], None, cancels=[asking, repeating])
        photo.change(on_photo, [messages, photo], outputs, preprocess=False, show_progress="hidden")
        stop.click(on_stop, messages, outputs)
        gr.on([clear.click, chat.clear], on_clear, None, outputs)
    return page


def _answered(history: History) -> History:
    """The history without a last question that has no answer."""
    return history[: len(history) // 2 * 2]


def _as_shown(history: History) -> History:
    """The chat in letters: the page would take tags in a text for HTML and drop them, or fetch pictures they name."""
    return [message | {"content": html.escape(message["content"], quote=False) or NOTHING} for message in history]


def _timed(pieces: Generator[str, None, None]) -> Iterator[tuple[str, str]]:
    """Text so far and a line about its speed, at most every `REFRESH_SECONDS` and once at the end."""
    start = time.perf_counter()
    shown, text = start, ""
    with contextlib.closing(pieces):
        for piece in pieces:
            text += piece
            now = time.perf_counter()
            if now - shown >= REFRESH_SECONDS:
                shown = now
                yield text, _speed(text, now - start)
    yield text, _speed(text, time.perf_counter() - start)


def _speed(text: str, seconds: float) -> str:
    return f"{len(text)} characters 字符 · {seconds:.1f} s · {len(text) / max(seconds, 1e-6):.0f}/s"


def _sentence(error: Exception, upload: Any) -> str:
    """What to tell the user, with the file's own name instead of its path on the server."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or not os.path.isabs(path):
        return text
    return text.replace(str(Path(path)), photo_name(upload))


def launch(page: "gr.Blocks", gui: Gui) -> None:
    """Serve the page on `gui.host`:`gui.port` from threads of its own; returns when it can be opened."""
    import gradio as gr

    for variable in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page once, which a proxy would not find
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "localhost", gui.host]))
    page.queue(default_concurrency_limit=4).launch(
        server_name=in_url(gui.host),
        server_port=gui.port,
        max_file_size=f"{gui.max_upload_mb}mb",
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
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


def end_on_signals() -> None:
    """Leave by SystemExit when told to end or when the terminal is closed, so that the uploads are removed."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    args = parser.parse_intermixed_args(arguments)
    checkpoint = args.checkpoint.absolute()
    overrides = parse_overrides(args.overrides)
    gui = read_config(checkpoint, overrides).gui
    check_port(gui)  # before the model is loaded, which may take a minute
    model = load_checkpoint(checkpoint, overrides=overrides)
    end_on_signals()
    with upload_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        page = build_page(Answerer(model), model.config.generate, checkpoint.name)
        launch(page, gui)
        host = in_url(gui.host)
        print(f"Open http://{host}:{gui.port} in a browser; Ctrl-C ends it.")
        print(f"From another machine: ssh -L {gui.port}:{host}:{gui.port} THIS_MACHINE", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run_script(main)
