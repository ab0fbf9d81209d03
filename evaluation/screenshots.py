"""Take the pictures of the page for READMEs and docs: start it, ask about photos in Chromium, save the screen.

    python -m evaluation.screenshots --checkpoint DIR --output docs/

writes the files of `SHOTS`: English and Chinese, phone, dark, where the model looked, side by side, an error. The
photos are the page's samples unless --photo names others. Needs `playwright` and a Chromium or Chrome.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cli import run_script, script_arguments

from errors import UserError, file_error, shortened
from paths import REPO_ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUESTIONS = {"en": ["What is in the picture?", "How many objects are there?"], "zh": ["这幅图像中有什么？"]}
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
START_SECONDS, ANSWER_SECONDS, WORD_SECONDS = 300, 300, 20


@contextmanager
def running_page(checkpoint: Path, overrides: list[str]):
    """Run `test_gui.py` in a separate process; yield its address.

    Raises:
        UserError: the process ended before it was reachable; the message contains its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [
        sys.executable,
        str(REPO_ROOT / "test_gui.py"),
        "--checkpoint",
        checkpoint,
        *overrides,
        f"gui.port={port}",
    ]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            process.kill()
            raise UserError(f"the page did not start: {process.communicate()[1].strip()}")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def running_browser():
    """Start a headless Chromium or Chrome of this machine; yield it.

    Raises:
        UserError: no browser is installed.
    """
    from playwright.sync_api import sync_playwright  # a development tool, only needed here

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise UserError(f"no browser found: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


class Shot(NamedTuple):
    """One picture: the browser's window, how many questions are asked, and what is opened after them."""

    width: int = 1280
    height: int = 800
    language: str = "en"
    dark: bool = False
    questions: int = 2
    then: Callable[["Page"], None] | None = None


def _look(page: "Page") -> None:
    from playwright.sync_api import TimeoutError

    page.click("#looking > button")
    try:
        page.locator("#words label").nth(1).click(timeout=WORD_SECONDS * 1000)
    except TimeoutError:  # the answer has no word
        page.click("#look")
    page.locator("#map img").wait_for()
    page.locator("#map").scroll_into_view_if_needed()


def _compare(page: "Page") -> None:
    page.click("#beside > button")
    page.click("#compare")
    page.wait_for_function("document.querySelector('#right-figures').innerText.includes('/s')")


def _fail(page: "Page") -> None:
    page.click("#part-panel > button")
    page.fill("#box :is(input, textarea)", "0.75,0.0,0.25,0.5")
    page.locator("#box :is(input, textarea)").blur()
    page.fill("#question textarea", QUESTIONS["en"][0])
    page.click("#ask")
    page.get_by_text("⚠").wait_for()


SHOTS = {
    "page.png": Shot(),
    "page_zh.png": Shot(language="zh"),
    "page_phone.png": Shot(width=390, height=844),
    "page_dark.png": Shot(dark=True),
    "page_looking.png": Shot(then=_look),
    "page_beside.png": Shot(questions=1, then=_compare),
    "page_error.png": Shot(then=_fail),
}


def take_screenshots(
    browser: "Browser", address: str, photos: list[Path], questions: list[str], output: Path
) -> list[Path]:
    """Ask `questions`, the first with `photos`, for each of `SHOTS`; save them in `output`, return their paths.

    Args:
        photos: empty: a sample of the page.
        questions: empty: those of the shot's language.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, shot in SHOTS.items():
        context = browser.new_context(
            viewport={"width": shot.width, "height": shot.height},
            locale={"en": "en-GB", "zh": "zh-CN"}[shot.language],
            color_scheme="dark" if shot.dark else "light",
        )
        page = context.new_page()
        page.set_default_timeout(ANSWER_SECONDS * 1000)
        page.goto(address)
        if photos:
            page.set_input_files("#question input[type=file]", [str(photo) for photo in photos])
        else:
            page.locator("#samples button").first.click()
        page.locator("#question .thumbnail-wrapper").nth(max(len(photos), 1) - 1).wait_for()
        for number, question in enumerate((questions or QUESTIONS[shot.language])[: shot.questions], start=1):
            page.fill("#question textarea", question)
            page.click("#ask")
            page.locator("#chat .message.bot").nth(number - 1).wait_for()
            page.wait_for_selector("#ask:enabled")
        page.evaluate("document.activeElement.blur()")
        if shot.then is not None:
            shot.then(page)
        page.wait_for_timeout(500)  # the buttons fade in
        page.screenshot(path=output / name, full_page=True)
        context.close()
    return [output / name for name in SHOTS]


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder")
    parser.add_argument(
        "--photo", type=Path, action="append", default=[], help="photo to ask about; may be given several times"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--question", action="append", default=[], help="may be given several times")
    args = parser.parse_intermixed_args(arguments)
    for photo in args.photo:
        if not os.path.isfile(photo):
            raise UserError(f"photo not found: {shortened(photo)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, f"--output: {shortened(args.output)}") from error
    with running_browser() as browser, running_page(args.checkpoint, args.overrides) as address:
        for file in take_screenshots(browser, address, args.photo, args.question, args.output):
            print(file)


if __name__ == "__main__":
    run_script(main)
