"""The chat template of an exported folder: Jinja with the same output as `qwen/chat.py`. Called by `folder.py`."""

from config import IMAGE_TAG, Prompt
from model.model import MMultiModal

PLACEHOLDER = "<image>"  # what data in LLaVA's format writes for a photo
TEXTS = "{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}"


def chat_template(model: MMultiModal) -> str:
    """Return the template; a photo is one `<|extra_0|>`, which a processor repeats.

    A message's content is a list of parts, whose photos go before the texts, or a string with `<image>` at the places
    of its photos. A system message at the beginning replaces the model's own sentence.
    """
    prompt = model.config.prompt
    prefix, tag, placeholder = _text(prompt.question_prefix), _text(IMAGE_TAG), _text(PLACEHOLDER)
    start = _start(prompt)
    count = "{%- set photos = message.content.split(" + placeholder + ") | length - 1 %}"
    if prompt.image_first:
        of_string = (
            "{%- if photos %}{{- " + tag + " * photos + '\\n' }}{%- endif %}"
            "{{- " + prefix + f" + message.content.replace({_text(PLACEHOLDER + chr(10))}, '')"
            f".replace({placeholder}, '') }}}}"
        )
        before, after = "''", prefix
    else:
        of_string = "{{- " + prefix + f" + message.content.replace({placeholder}, {tag}) }}}}"
        before, after = prefix, "''"
    return _dialogue(
        model,
        "{%- if message.content is string %}" + count + start + of_string + "{%- else %}"
        "{%- set photos = message.content | selectattr('type', 'equalto', 'image') | list | length %}"
        f"{start}{{{{- {before} + {tag} * photos }}}}"
        "{%- if photos %}{{- '\\n' }}{%- endif %}"
        f"{{{{- {after} }}}}" + TEXTS + "{%- endif %}",
    )


def llama_cpp_template(model: MMultiModal) -> str:
    """Return the template for llama.cpp; photos go before the text.

    llama.cpp puts a marker at the place of each photo, `<__media…__>`. Its middle part changes at every start. The
    content is a string or a list of parts, and a marker's part has a text too.
    """
    prompt = model.config.prompt
    prefix = _text(prompt.question_prefix)
    before, after = ("''", prefix) if prompt.image_first else (prefix, "''")
    return _dialogue(
        model,
        "{%- if message.content is string %}{%- set text = message.content %}"
        "{%- else %}{%- set text = message.content | map(attribute='text') | join %}{%- endif %}"
        "{%- set pieces = (text + '<__media').split('<__media') %}"
        "{%- set marker = '<__media' + pieces[1].split('__>')[0] + '__>' %}"
        "{%- set photos = text.split(marker) | length - 1 %}"
        f"{_start(prompt)}{{{{- {before} }}}}{{%- for photo in range(photos) %}}{{{{- marker }}}}{{%- endfor %}}"
        "{%- if photos %}{{- '\\n' }}{%- endif %}"
        f"{{{{- {after} + text.replace(marker + '\\n', '').replace(marker, '') }}}}",
    )


def _dialogue(model: MMultiModal, question: str) -> str:
    """Return a template that writes a user's `message` by `question`."""
    chat = model.processor.chat
    opened = f"<|im_start|>assistant\n{chat.think}"
    system_start = "{%- if system %}{%- set system = '\\n' + system %}{%- endif %}" if chat.text_start else ""
    # Qwen v1 has a system block for an empty sentence too
    shown = "true" if chat.first_generation else "system"
    return (
        f"{{%- set system = {_text(model.config.prompt.system)} %}}"
        "{%- if messages[0].role == 'system' %}"
        "{%- set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
        f"{system_start}"
        "{%- set messages = messages[1:] %}{%- endif %}"
        f"{{%- if {shown} %}}{{{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}}}{{%- endif %}}"
        "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' }}"
        + question
        + "{{- '<|im_end|>\\n' }}"
        "{%- elif message.role == 'assistant' %}"
        f"{{{{- {_text(opened + chat.text_start)} }}}}"
        "{%- if message.content is string %}{{- message.content | trim }}{%- else %}" + TEXTS + "{%- endif %}"
        f"{{{{- {_text(model.config.prompt.end_token + chr(10))} }}}}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {_text(opened)} }}}}{{%- endif %}}"
    )


def _start(prompt: Prompt) -> str:
    """Return the part of a template that begins a question without photos; `photos` is their number."""
    return "{%- if not photos %}{{- '\\n' }}{%- endif %}" if prompt.newline_before_text else ""


def _text(text: str) -> str:
    """`text` as a Jinja string."""
    return repr(text)
