"""The chat template of an export gives the ids of `qwen/chat.py`, and the model card says what is in the folder."""

import itertools
import json

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, pipeline

from answering.answer import Answerer
from exporting.card import card_facts, licence
from exporting.folder import write_processor
from exporting.write import check_export, write_export
from model.checkpoint import load_checkpoint

PROMPTS = {
    "default": {},
    "every setting": {
        "system": 'Sei kurz. it\'s a \\n "test"',
        "question_prefix": "用中文回答：",
        "image_first": True,
        "end_token": "<|endoftext|>",
    },
    "prefix": {"question_prefix": "Answer: "},
    "photo first": {"image_first": True},
    "no system": {"system": ""},
    "newlines": {"system": "", "image_first": True, "newline_before_text": True},
    "newlines and prefix": {"question_prefix": "Answer: ", "newline_before_text": True},
}
KINDS = ["qwen2-tied", "qwen3-tied", "llama-tied", "qwen1"]


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}


def dialogues(chat):
    """Name → our messages, and the same for a template."""
    return {
        "a typed question": (
            [chat.typed_question("What is it?", 1)],
            [{"role": "user", "content": [IMAGE, text("What is it?")]}],
        ),
        "two photos, their text first": (
            [chat.typed_question("Same? 相同吗？", 2)],
            [{"role": "user", "content": [text("Same? 相同吗？"), IMAGE, IMAGE]}],
        ),
        "no photo": ([chat.typed_question("Hello", 0)], [{"role": "user", "content": "Hello"}]),
        "a dialogue": (
            [
                chat.typed_question("A?", 1),
                chat.answer(" b\n"),
                chat.typed_question("C?", 0),
                chat.answer("d"),
                chat.typed_question("E?", 1),
            ],
            [
                {"role": "user", "content": [IMAGE, text("A?")]},
                {"role": "assistant", "content": " b\n"},
                {"role": "user", "content": "C?"},
                {"role": "assistant", "content": [text("d")]},
                {"role": "user", "content": [IMAGE, text("E?")]},
            ],
        ),
        "tags in a string": (
            [chat.question("First <|extra_0|>\nthen <|extra_0|> and?", 2)],
            [{"role": "user", "content": "First <image>\nthen <image> and?"}],
        ),
        "a tag at the end": ([chat.question("What?\n<|extra_0|>", 1)], [{"role": "user", "content": "What?\n<image>"}]),
    }


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_clean_dialogues(make, tmp_path, kind, prompt):
    model = make(kind, prompt=prompt)
    write_processor(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, (ours, theirs) in dialogues(model.processor.chat).items():
        rendered = tokenizer.apply_chat_template(theirs, tokenize=False, add_generation_prompt=True)
        rendered = rendered.replace("<|extra_0|>", "<|extra_0|>" * model.processor.chat.plan.crop_tokens)
        assert tokenizer.encode(rendered, add_special_tokens=False) == model.processor.chat.render(ours)[0], name


def test_a_system_message_replaces_ours(make, tmp_path):
    write_processor(make(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for content in ("Be rude.", [text("Be rude.")]):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hello"}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


def test_typed_control_tokens_are_control_tokens_in_an_export_and_text_here(make, tmp_path):
    """As docs/carrying.md says."""
    model = make()
    write_processor(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    typed, chat = "What?<|im_end|>", model.processor.chat
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": typed}], return_dict=False)
    ours = chat.render([chat.typed_question(typed, 0)])[0]
    assert theirs.count(end) == ours.count(end) + 1


def test_the_library_s_pipeline_gives_our_answers(make, export, tmp_path):
    model = make("qwen2-untied", generate={"max_new_tokens": 8})
    photos = [Image.new("RGB", size, colour) for size, colour in (((80, 60), "red"), ((40, 90), "blue"))]
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
    questions = ["What is it?", "Which colour is in the picture, and why?"]
    expected = [Answerer(model).answer(photo, question) for photo, question in zip(photos, questions, strict=True)]
    folder, _ = export(model)
    ask = pipeline("image-text-to-text", model=str(folder))
    dialogues = [
        [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / f"{number}.png")}, text(question)]}]
        for number, question in enumerate(questions)
    ]
    single = [ask(text=dialogue, return_full_text=False)[0]["generated_text"] for dialogue in dialogues]
    assert single == expected
    batch = ask(text=dialogues, return_full_text=False, batch_size=2)
    assert [answer[0]["generated_text"] for answer in batch] == expected


def test_the_processor_finds_photos_and_template(make, export):
    folder, _ = export(make(prompt={"question_prefix": "用中文回答："}))
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [IMAGE | {"image": Image.new("RGB", (30, 40))}, text("?")]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 15


def test_the_card_says_what_is_in_the_folder(tiny_checkpoint, workshop, tmp_path, same_process):
    scores = {"passes": {"trained": {"overall": {"questions": 3, "accuracy": 0.6666}}}}
    folder = tiny_checkpoint / "eval_val"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(scores))
    model = load_checkpoint(tiny_checkpoint, overrides={"model_root": str(workshop)})
    check_export(write_export(model, tmp_path / "out", "llava", card_facts(model, tiny_checkpoint, model.config)))
    card = (tmp_path / "out" / "README.md").read_text()
    facts = ["LlavaForConditionalGeneration", "float32", "siglip", "LoRA, rank 4, merged", "not stated in its folder"]
    facts += ["| training | step | 2 |", "| eval_val | accuracy | 0.6666 |", "max_steps: 2", "control tokens"]
    facts += ["pipeline_tag: image-text-to-text", "greedy answers are the same"]
    assert [fact for fact in facts if fact not in card] == []
    assert str(tiny_checkpoint.parent.parent) not in card


def test_licences_are_read_from_the_parts(tmp_path):
    assert licence(tmp_path) == "not stated in its folder"
    (tmp_path / "LICENSE").write_text("Apache License")
    assert licence(tmp_path) == "see its LICENSE"
    for head, expected in itertools.chain(
        {"license: apache-2.0": "apache-2.0", "license: other\nlicense_name: qwen": "qwen"}.items(),
        {"tags: [x]": "see its LICENSE", "license: [": "see its LICENSE"}.items(),
    ):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Model\n")
        assert licence(tmp_path) == expected
