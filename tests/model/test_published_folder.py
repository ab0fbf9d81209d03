"""A published LLaVA-Qwen folder, SigLIP without its head and an empty line before texts, answers as its stock class."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from answering.answer import Answerer
from config import Prompt
from errors import UserError
from model.checkpoint import load_checkpoint
from model.stock_folder import read_prompt
from predict import main as predict_main
from qwen.chat import Message
from tests.tiny import tiny_config, write_records, write_siglip, write_tokenizer
from training.loop import Trainer

# photos first, then every text on a line of its own, in answers too
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\\n' ~ part.text }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STEPS = 12  # tokens of an answer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Its files are those of llava-hf/llava-interleave-qwen-0.5b-hf, with tiny random weights."""
    folder = tmp_path_factory.mktemp("published")
    write_siglip(folder)  # for its preprocessor_config.json
    write_tokenizer(folder, merges=("Ċ Ċ",))  # two line breaks are one token, as in Qwen's tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    image_id, end_id = tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>"])
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8, "tie_word_embeddings": False}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=56, patch_size=14, vision_use_head=False, **vision),
        text_config=Qwen2Config(initializer_range=0.5, bos_token_id=None, eos_token_id=end_id, **text),
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    for token, number in tokenizer.get_vocab().items():  # answers of letters, as bytes of no text all look alike
        if not (len(token) == 1 and token.isascii()):
            model.lm_head.weight.data[number] = 0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_id}))
    processor = {"processor_class": "LlavaProcessor", "image_token": "<image>", "num_additional_image_tokens": 0}
    processor |= {"patch_size": 14, "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((80, 60)).save(file)
    return file


def words(text):
    return {"type": "text", "text": text}


def test_a_template_in_the_processors_own_file_counts(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "folder")
    (folder / "chat_template.json").unlink()
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    assert read_prompt(folder) == read_prompt(published)


# photos and text of the user, answer, …: each begins a new turn
DIALOGUES = {
    "a photo": [(1, "What is it?")],
    "no photo": [(0, "Hello, 你好")],
    "several turns": [(1, "What is it?"), "A ramp.", (0, "Why?"), "It is grey.", (0, "And now?")],
    "a photo later": [(0, "Hello"), "Hi.", (1, "What is it?")],
}


def theirs(dialogue):
    return [
        {"role": "assistant", "content": [words(turn)]}
        if isinstance(turn, str)
        else {"role": "user", "content": [{"type": "image"}] * turn[0] + [words(turn[1])]}
        for turn in dialogue
    ]


def ours(chat, dialogue):
    return [chat.answer(turn) if isinstance(turn, str) else chat.typed_question(turn[1], turn[0]) for turn in dialogue]


@pytest.fixture(scope="module")
def stock(published):
    """Its processor and model, as transformers loads them."""
    return AutoProcessor.from_pretrained(published), LlavaForConditionalGeneration.from_pretrained(published)


def stock_answer(stock, dialogue, photo, suppressed):
    """Prompt ids and greedy text of the stock class."""
    processor, model = stock
    prompt = processor.apply_chat_template(theirs(dialogue), add_generation_prompt=True)
    photos = [Image.open(photo)] if "<image>" in prompt else None
    inputs = processor(images=photos, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=suppressed)[0]
    length = inputs["input_ids"].shape[1]
    return ids[:length].tolist(), processor.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.parametrize("name", DIALOGUES)
def test_ids_and_answers_are_those_of_the_stock_class(published, stock, photo, name):
    model, dialogue = load_checkpoint(published), DIALOGUES[name]
    ids, text = stock_answer(stock, dialogue, photo, model.suppressed_ids)
    chat = model.processor.chat
    same_tag = {chat.image_token_id: stock[0].image_token_id}
    messages = ours(chat, dialogue)
    assert [same_tag.get(token, token) for token in chat.render(messages)[0]] == ids
    settings = model.config.generate.model_copy(update={"max_new_tokens": STEPS})
    photos = [photo] * (stock[0].image_token_id in ids)
    assert Answerer(model).stream_messages(photos, messages, settings).rest().text == text
    assert text.strip()


def test_a_system_message(published, stock):
    chat = load_checkpoint(published).processor.chat
    messages = [{"role": "system", "content": [words("Be brief.")]}, *theirs(DIALOGUES["no photo"])]
    ids = chat.render([Message("system", ("Be brief.",)), *ours(chat, DIALOGUES["no photo"])])[0]
    assert chat.tokenizer.decode(ids) == stock[0].apply_chat_template(messages, add_generation_prompt=True)


def test_predict_and_training_take_it(published, stock, photo, tmp_path, capsys):
    write_records(tmp_path)
    prompt = {"system": "", "image_first": True, "newline_before_text": True}
    assert load_checkpoint(published).config.prompt == Prompt(**prompt)
    trainer = Trainer(
        tiny_config(
            tmp_path,
            visual={"path": str(published), "feature": "last", "drop": "none"},
            llm={"path": str(published)},
            prompt=prompt,
            train={"init_from": str(published), "max_steps": 1},
            generate={"max_new_tokens": STEPS},
        )
    )
    _, expected = stock_answer(stock, DIALOGUES["a photo"], photo, trainer.model.suppressed_ids)
    assert Answerer(trainer.model.eval()).answer(photo, "What is it?") == expected  # its new LoRA adds nothing yet
    trained = trainer.run()
    capsys.readouterr()
    question = ["--image", str(photo), "--question", "What is it?", f"generate.max_new_tokens={STEPS}"]
    predict_main(["--checkpoint", str(published), *question])
    assert capsys.readouterr().out.strip() == expected.strip()
    predict_main(["--checkpoint", str(trained), *question, f"model_root={published.parent}"])
    assert capsys.readouterr().out.strip() not in {"", expected.strip()}


def read(published, folder, template):
    """The prompt that is read where a folder has another template."""
    for file in published.iterdir():
        if file.name != "chat_template.json":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return read_prompt(folder)


def test_a_line_break_behind_the_photo_only(published, tmp_path):
    template = TEMPLATE.replace("<image>", "<image>\n").replace("'\\n' ~ part.text", "part.text")
    expected = {"system": "", "question_prefix": "", "image_first": True, "newline_before_text": False}
    assert read(published, tmp_path, template) == expected | {"end_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (TEMPLATE.replace("'\\n' ~ part.text", "part.text"), "user.n<image>ONE<"),  # no line break
        (TEMPLATE.replace("'\\n' ~ part", "('' if message.role == 'assistant' else '\\n') ~ part"), "assistant.nTWO"),
        ("{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}", "nothing for a list"),
        ("{{ raise_exception('no photos') }}", "nothing for a list of parts"),
        ("USER: {{ messages[0].content[1].text }} ASSISTANT:", "'USER: ONE ASSISTANT:'"),
    ],
)
def test_what_a_template_writes_otherwise_is_said(published, tmp_path, template, shown):
    with pytest.raises(UserError, match=rf"format of qwen/chat.py .*, but writes .*{shown}.*: train on from it with"):
        read(published, tmp_path, template)
