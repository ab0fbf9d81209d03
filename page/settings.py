"""What is asked and how: the checkpoint, and the settings for choosing the next tokens."""

from typing import Any

import gradio as gr

from config import Generate
from page.checkpoints import Engines
from page.texts import label

# in the order of the panel
NAMES = ("greedy", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "longest", "system")
DRAWN = ("temperature", "top_p", "top_k", "min_p", "seed")  # mean nothing if the likeliest token is always taken
FIRST_TEMPERATURE = 0.7  # where drawing begins if the config has 0


def checkpoint_choice(engines: Engines) -> gr.Dropdown:
    """Add the list of checkpoints, which is read anew whenever it is opened."""
    choice = gr.Dropdown(
        engines.names(),
        value=engines.first,
        label=label("checkpoint"),
        info=label("checkpoint_info") if engines.has_weights else None,
        interactive=engines.has_weights,
        elem_id="checkpoint",
    )
    choice.focus(lambda: gr.update(choices=engines.names()), None, choice, api_visibility="private")
    return choice


def settings_panel(generate: Generate) -> list[Any]:
    """Add the panel; return the inputs of `as_settings`."""
    greedy = generate.temperature == 0
    with gr.Accordion(label("settings"), open=False, elem_id="settings"):

        def slider(name: str, lowest: float, highest: float, value: float, step: float) -> gr.Slider:
            return gr.Slider(
                lowest,
                max(highest, value),
                value,
                step=step,
                label=label(name),
                interactive=not (greedy and name in DRAWN),
                elem_id=name,
            )

        box = gr.Checkbox(greedy, label=label("greedy"), info=label("greedy_info"), elem_id="greedy")
        inputs = [
            box,
            slider("temperature", 0.05, 2, generate.temperature or FIRST_TEMPERATURE, 0.05),
            slider("top_p", 0.05, 1, generate.top_p, 0.05),
            slider("top_k", 0, 200, generate.top_k, 1),
            slider("min_p", 0, 1, generate.min_p, 0.01),
            slider("repetition_penalty", 0.5, 2, generate.repetition_penalty, 0.05),
            gr.Number(generate.seed, label=label("seed"), precision=0, interactive=not greedy, elem_id="seed"),
            slider("longest", 1, 1024, generate.max_new_tokens, 1),
            gr.Textbox("", label=label("system"), info=label("system_info"), lines=2, max_lines=6, elem_id="system"),
        ]
        drawn = [component for name, component in zip(NAMES, inputs, strict=True) if name in DRAWN]
        script = f"greedy => Array({len(drawn)}).fill({{__type__: 'update', interactive: !greedy}})"
        box.change(None, box, drawn, js=script)
    return inputs


def as_settings(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the values of the panel as fields of `Generate`, and `system`; they are not checked."""
    named = dict(zip(NAMES, values, strict=True))
    if named.pop("greedy"):
        named["temperature"] = 0
    named["max_new_tokens"] = named.pop("longest")
    return named
