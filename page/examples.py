"""What to try first: example questions, sample photos, and the camera; all go into the question box."""

from typing import Any

import gradio as gr

from page.asking import PRIVATE, Shared
from page.chat import UploadedPhoto, checked, in_box, typed
from page.texts import label
from page.uploads import store

QUESTIONS = ("example_1", "example_2", "example_3")


def examples_panel(question: gr.MultimodalTextbox, samples: dict[str, bytes], shared: Shared) -> None:
    """Add the panel.

    Args:
        question: the question box.
        samples: photos by file name.
    """
    with gr.Row(elem_id="examples"):
        for key in QUESTIONS:
            button = gr.Button(label(key), size="sm", min_width=60)
            # not ...box: after an answer, Gradio leaves a mark of its own in it
            button.click(None, [button, question], question, js="(text, box) => ({text, files: box.files})")

    def add(request: gr.Request, payload: Any, photo: UploadedPhoto) -> dict[str, Any]:
        text, uploads = typed(payload)
        shared.files.hold(request.session_hash or "", photo.path)
        return in_box(text, [*(checked(upload, shared.folder) for upload in uploads), photo])

    def sample(name: str) -> Any:
        def on_sample(request: gr.Request, payload: Any) -> dict[str, Any]:
            return add(request, payload, UploadedPhoto(store(shared.folder, samples[name], name), name))

        return on_sample

    def on_snapshot(request: gr.Request, payload: Any, picture: Any) -> tuple[dict[str, Any], None]:
        return add(request, payload, checked(picture, shared.folder)), None

    if samples:
        with gr.Row(elem_id="samples"):
            for name, content in samples.items():
                icon = store(shared.folder, content, f"icon-{name}")
                shared.files.hold(None, icon)  # else a client that asks about it could remove it
                button = gr.Button(label("sample"), icon=icon, size="sm", min_width=60)
                # Gradio keeps only values: an icon would go an hour after the start, as an old upload
                button.keep_in_cache.add(button.icon["path"])
                button.click(sample(name), question, question, **PRIVATE)
    with gr.Accordion(label("camera"), open=False, elem_id="camera"):
        camera = gr.Image(sources=["webcam"], show_label=False, label=label("camera"), buttons=[], height=240)
        camera.input(on_snapshot, [question, camera], [question, camera], **PRIVATE)
