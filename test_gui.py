"""Web page to ask a checkpoint about photos; each question may come with one or several.

    python test_gui.py --checkpoint checkpoints/demo/checkpoint-240
    python test_gui.py --checkpoint DIR gui.port=8000 gui.max_upload_mb=50
    python test_gui.py --server http://127.0.0.1:8000/v1

Only this machine can open the page (gui.host=0.0.0.0 lets others in). It answers one question at a time and fetches
nothing from the network. Uploaded photos stay in a temporary folder until an hour after their last use, or until the
page ends. The page opens no other file of the disk. With --server, an OpenAI-compatible server gets the photos.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import add_model_options, check_model_options, run_script, script_arguments

from answering.answer import Answerer
from answering.remote import RemoteAnswerer, connect
from answering.request import AnyAnswerer, ReplyStream
from config import Generate, Gui, changed, parse_overrides
from errors import UserError, check_text, is_out_of_memory
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import read_config
from page.address import check_port, in_url
from page.chat import History, UploadedPhoto, answered, as_shown, checked, in_box, photos_of, typed
from page.uploads import upload_folder
from visual.transform import load_image

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

EXAMPLES = [
    "What is in the picture?",
    "How many objects are there?",
    "Describe the picture.",
    "这幅图像中有什么？",
    "这幅图像描述了什么？",
]
HELLO = "<center>Add photos with the paper clip, or drop or paste them<br>点回形针、拖入或粘贴照片，然后提问</center>"
NO_PHOTO = "No photo yet: add one to the question. 还没有照片，请先添加一张。"
NO_QUESTION = "The question is empty: type one first. 问题是空的，请先输入问题。"
NO_ANSWER = "There is no answer to repeat yet. 还没有可以重答的内容。"
SAME_ANSWER = "At temperature 0 the answer stays the same. 温度为 0 时回答不会改变。"
WORKING = "Looking at the photo… 正在看图……"
STOPPED = "Stopped. 已停止。"
OUT_OF_MEMORY = (
    "Out of memory: lower 'Longest answer', press Clear for a shorter chat, close other programs on this device, "
    "or load a smaller model. 内存不足：请调小“最长回答”，清空对话，关闭占用同一设备的其他程序，或换用更小的模型。"
)
REFRESH_SECONDS = 0.05  # the page is redrawn at most this often while an answer grows
KEEP_SECONDS = 3600  # how long an upload is kept after its last use

FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]  # present on most systems
CSS = """
.gradio-container {width: 100% !important; max-width: 960px !important; margin: 0 auto !important}
#title h1 {margin: 0; font-size: 1.5rem}
#title p {margin: 0; opacity: .7}
#status {min-height: 1.5em; opacity: .75}
#chat .user.message:has(.component) {display: flex; flex-wrap: wrap; gap: 4px 8px; margin-left: auto}
#chat .user.message > .component {width: auto}
#chat .user.message > :not(.component) {flex-basis: 100%}
#chat .user.message img {height: auto; width: auto; max-height: 180px; max-width: 100%}
#chat .message-buttons {display: none}  /* Gradio's would share a photo on a website */
footer {display: none !important}
@media (max-width: 640px) {
  #title h1 {font-size: 1.2rem}
  #chat .user.message img {max-height: 110px}
  #ask, #stop, #again, #clear {font-size: .8rem !important; padding: 8px 2px !important; white-space: nowrap !important}
}
"""


def build_page(answerer: AnyAnswerer, generate: Generate, name: str) -> "gr.Blocks":
    """The page: chat, question box with photos, settings.

    Args:
        generate: start values of the settings.
        name: checkpoint name, shown under the title.
    """
    import gradio as gr  # gradio creates its upload folder at import, so main must set it before

    active: set[str | None] = set()  # sessions with an unfinished answer
    decoded = functools.lru_cache(maxsize=8)(load_image)  # each upload has its own path; follow-ups decode nothing
    folder = Path(os.environ["GRADIO_TEMP_DIR"])

    def load(photo: UploadedPhoto) -> "Image.Image | Path":
        path = checked({"path": photo.path}, folder).path  # checks that it still exists, keeps it another hour
        image = decoded(path)  # or tells what is wrong with it
        return Path(path) if isinstance(answerer, RemoteAnswerer) else image  # a file is smaller on its way

    with gr.Blocks(
        title="Ask about a photo 看图问答",
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS // 6, KEEP_SECONDS),
    ) as page:
        gr.Markdown(f"# Ask about a photo 看图问答\n`{name}`", elem_id="title")
        messages = gr.State([])  # messages sent to the model; the chat also shows failed questions
        chat = gr.Chatbot(
            label="Chat 对话",
            height=460,
            elem_id="chat",
            placeholder=HELLO,
            buttons=["copy_all"],
            render_markdown=False,
            latex_delimiters=[],
        )
        status = gr.Markdown("", elem_id="status")
        with gr.Row(equal_height=False):
            question = gr.MultimodalTextbox(
                show_label=False,
                container=False,
                placeholder="Question 问题",
                file_count="multiple",
                file_types=["image"],
                lines=1,
                max_lines=4,
                max_plain_text_length=2**31,  # a longer text would be pasted as a file
                submit_btn=False,
                scale=5,
                min_width=260,
                elem_id="question",
            )
            ask = gr.Button("Ask 提问", variant="primary", scale=1, min_width=100, elem_id="ask")
        with gr.Row():
            stop = gr.Button("Stop 停止", interactive=False, min_width=90, elem_id="stop")
            again = gr.Button("Retry 重答", min_width=90, elem_id="again")
            clear = gr.Button("Clear 清空", min_width=90, elem_id="clear")
        examples = gr.Dataset(
            components=["textbox"], samples=[[text] for text in EXAMPLES], label="Examples 示例", elem_id="examples"
        )
        with gr.Accordion("Settings 设置", open=False):
            limit, label = max(1024, generate.max_new_tokens), "Longest answer, tokens 最长回答（词元）"
            longest = gr.Slider(1, limit, generate.max_new_tokens, step=1, label=label)
            label, info = "Temperature 温度", "0: always the likeliest word 总选最可能的词"
            temperature = gr.Slider(0, 2, generate.temperature, step=0.05, label=label, info=info)

        def show(history: History, line: str, busy: bool) -> dict[Any, Any]:
            return {
                messages: history,
                chat: as_shown(history),
                status: line,
                ask: gr.update(interactive=not busy),
                again: gr.update(interactive=not busy),
                stop: gr.update(interactive=busy),
            }

        def complain(sentence: str) -> dict[Any, Any]:
            gr.Warning(sentence)
            return {status: sentence}

        def answer(session: str | None, history: History, uploads: list[Any], settings: dict[str, Any]):
            """Stream the answer to the last question of `history`, sent with `uploads`."""
            *before, asked = history
            readable, text, line = [], "", ""
            try:
                active.add(session)
                # check before display, because the page serves every displayed file
                photos = [checked(upload, folder) for upload in uploads]
                readable, history = photos, [*before, asked | {"photos": photos}]
                yield show(history, WORKING, busy=True)
                check_text(asked["content"], "the question 问题")
                decoding = changed(generate, settings, "settings 设置")
                readable, problems = _readable(photos, load)
                if problems:
                    raise problems[0]
                sent = [
                    {"role": message["role"], "content": message["content"]}
                    | {"images": [load(photo) for photo in message.get("photos", ())]}
                    for message in history
                ]
                for text, line in _timed(answerer.stream(None, sent, decoding)):
                    yield show([*history, {"role": "assistant", "content": text}], line, busy=True)
                yield show([*history, {"role": "assistant", "content": text}], line, busy=False)
            except Exception as error:  # any error is shown in the chat, and the page stays usable
                sentence = f"⚠ {_sentence(error, photos_of(history))}"
                failed = [*before, asked | {"photos": readable}, {"role": "assistant", "content": sentence}]
                back = {question: in_box(asked["content"], readable)}
                yield show(before, "", busy=False) | {chat: as_shown(failed)} | back
                if not isinstance(error, UserError) and not is_out_of_memory(error):
                    raise
            finally:
                active.discard(session)

        def settle(session: str | None) -> None:
            """Wait until a cancelled answer has ended, so none of its output reaches the page after our update."""
            while session in active:
                time.sleep(0.02)

        def on_ask(history, payload, longest, temperature, request: gr.Request):
            history, (text, uploads) = answered(history), typed(payload)
            if not text or not (uploads or photos_of(history)):
                yield complain(NO_QUESTION if uploads or photos_of(history) else NO_PHOTO)
                return
            yield {question: in_box("")}
            history = [*history, {"role": "user", "content": text}]
            settings = {"max_new_tokens": longest, "temperature": temperature}
            yield from answer(request.session_hash, history, uploads, settings)

        def on_again(history, longest, temperature, request: gr.Request):
            history = answered(history)
            if not history:
                yield complain(NO_ANSWER)
                return
            if temperature == 0:
                gr.Info(SAME_ANSWER)
            settings = {"max_new_tokens": longest, "temperature": temperature, "seed": time.time_ns() % 2**31}
            uploads = [{"path": photo.path, "orig_name": photo.name} for photo in history[-2]["photos"]]
            yield from answer(request.session_hash, history[:-1], uploads, settings)

        def on_stop(history, request: gr.Request):
            settle(request.session_hash)
            update = show(answered(history), STOPPED, busy=False)
            if len(history) % 2:  # stopped before the first word: return the question to the box
                update[question] = in_box(history[-1]["content"], history[-1]["photos"])
            return update

        def on_clear(request: gr.Request):
            settle(request.session_hash)
            return show([], "", busy=False)

        outputs = [messages, chat, status, question, ask, again, stop]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        # preprocess=False: Gradio would raise a traceback for a file that is not an upload
        inputs = [messages, question, longest, temperature]
        asking = gr.on([ask.click, question.submit], on_ask, inputs, outputs, preprocess=False, **one_at_a_time)
        inputs = [messages, longest, temperature]
        repeating = again.click(on_again, inputs, outputs, preprocess=False, **one_at_a_time)
        # listeners run in this order: first cancel the answer, then wait for its end in settle
        gr.on([stop.click, clear.click, chat.clear], None, cancels=[asking, repeating])
        stop.click(on_stop, messages, outputs)
        gr.on([clear.click, chat.clear], on_clear, None, outputs)
        # runs in the browser, because the server would have to check the box's photos before returning them
        script = f"(index, box) => ({{...box, text: {json.dumps(EXAMPLES)}[index]}})"
        examples.click(None, [examples, question], question, js=script)
    return page


def _readable(
    photos: list[UploadedPhoto], load: Callable[[UploadedPhoto], Any]
) -> tuple[list[UploadedPhoto], list[UserError]]:
    """Return the readable photos, and the errors of the others."""
    sound, problems = [], []
    for photo in photos:
        try:
            load(photo)
            sound.append(photo)
        except UserError as error:
            problems.append(error)
    return sound, problems


def _timed(pieces: ReplyStream) -> Iterator[tuple[str, str]]:
    """Yield the text so far and a line with its speed, at most every `REFRESH_SECONDS` and once at the end."""
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


def _sentence(error: Exception, photos: list[UploadedPhoto]) -> str:
    """Return the message for the user, with file names instead of paths on the server."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    for photo in photos:
        text = text.replace(photo.path, photo.name)
    return text


def launch(page: "gr.Blocks", gui: Gui) -> None:
    """Serve the page on `gui.host`:`gui.port` in background threads; return when it is ready."""
    import gradio as gr

    for variable in ("no_proxy", "NO_PROXY"):  # Gradio requests its own page once, which fails through a proxy
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
        answerer, config = connect(args, overrides, "gui")
        gui, generate, name = config.gui, config.generate, f"{answerer.name} · {answerer.url}"
        check_port(gui)
    else:
        checkpoint = args.checkpoint.absolute()
        gui = read_config(checkpoint, overrides).gui
        check_port(gui)  # before the model is loaded, which may take a minute
        model = load_checkpoint(checkpoint, overrides=overrides)
        answerer, generate, name = Answerer(model), model.config.generate, checkpoint.name
    end_on_signals()
    with upload_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        page = build_page(answerer, generate, name)
        launch(page, gui)
        host = in_url(gui.host)
        print(f"Open http://{host}:{gui.port} in a browser; Ctrl-C ends it.")
        print(f"From another machine: ssh -L {gui.port}:{host}:{gui.port} THIS_MACHINE", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run_script(main)
