"""A stock LLaVA folder answers as its stock class does, and training starts from it; unknown parts are named."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import eval_vqa
import serve
import test_gui
from answering.answer import Answerer
from config import Prompt
from errors import UserError
from exporting.write import check_export, write_export
from model.checkpoint import load_checkpoint
from model.model import MMultiModal
from model.restore import restore_weights
from predict import main as predict_main
from tests.conftest import compare_here
from tests.exporting.conftest import FACTS
from tests.telling import free_port
from tests.tiny import fill_trained, tiny_config, write_clip
from training.loop import Trainer

QUESTION = "What is it?"
WEIGHTS = "model.safetensors"
PROMPTS = {
    "default": {},
    "other": {
        "system": "Sei kurz.",
        "question_prefix": "用中文回答：",
        "image_first": True,
        "end_token": "<|endoftext|>",
    },
    "photo first": {"system": "", "image_first": True},
}


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((80, 60)).save(file)
    return file


def exported(backbones, tmp_path, name="qwen2-untied", visual=None, target="llava", **sections):
    """A model of which every trained weight shows, its answer, and its exported folder."""
    visual = {"path": str(backbones / "siglip"), "feature": "last"} | (visual or {})
    model = MMultiModal.from_config(
        tiny_config(backbones, visual=visual, llm={"path": str(backbones / name)}, **sections)
    )
    fill_trained(model.eval())
    written = write_export(model, tmp_path / "stock", target, FACTS)
    check_export(written)
    return tmp_path / "stock"


@pytest.fixture(scope="module")
def plain(backbones, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        compare_here(patch)
        return exported(backbones, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def stock(backbones, plain, tmp_path, same_process):
    """`stock(…)`: what `exported` returns, in a folder that the test may change."""

    def make(*arguments, **sections):
        if arguments or sections:
            return exported(backbones, tmp_path, *arguments, **sections)
        return shutil.copytree(plain, tmp_path / "stock")

    return make


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen3-tied", "llama-untied", "qwen1"])
def test_it_answers_as_the_trained_model(backbones, stock, photo, name, capsys):
    model = MMultiModal.from_config(
        tiny_config(
            backbones,
            visual={"feature": "last", "path": str(backbones / "siglip")},
            llm={"path": str(backbones / name)},
        )
    ).eval()
    fill_trained(model)
    expected = Answerer(model).answer(photo, QUESTION)
    folder = stock(name)
    predict_main(["--checkpoint", str(folder), "--image", str(photo), "--question", QUESTION])
    assert capsys.readouterr().out.strip() == expected.strip()


def test_evaluation_server_and_page_take_it(stock, photo, tmp_path, monkeypatch):
    folder = stock()
    expected = Answerer(load_checkpoint(folder)).answer(photo, QUESTION)
    engines = []

    def begin(engine, *_):
        engines.append(engine)
        raise UserError("begun")

    options = ["--checkpoint", str(folder)]
    monkeypatch.setattr("serving.app.Service", begin)
    with pytest.raises(UserError, match="begun"):
        serve.main([*options, "--port", str(free_port())])
    monkeypatch.setattr(test_gui, "end_on_signals", lambda: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # the page sets it; put back behind this test
    monkeypatch.setattr("page.build.build_page", begin)
    with pytest.raises(UserError, match="begun"):
        test_gui.main([*options, f"gui.port={free_port()}"])
    server, page = engines
    assert server.answer(photo, QUESTION) == expected
    assert page.names() == [(folder.name, folder.name)]
    assert page.get(folder.name)[0].answer(photo, QUESTION) == expected
    row = {"image": photo.name, "question": QUESTION, "answer": "grey"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    files = ["--format", "jsonl", "--annotations", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path)]
    eval_vqa.main([*options, *files, "--output", str(tmp_path / "scores"), "--baselines", "text", "untrained"])
    lines = (tmp_path / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    answers = {row["pass"]: row["answer"] for row in map(json.loads, lines)}
    assert answers["trained"] == expected
    assert set(answers) == {"trained", "text", "untrained"}


@pytest.mark.parametrize(
    "visual", [{"feature": "penultimate"}, {"feature": "last", "drop": "none"}, {"feature": "output"}, "clip"], ids=str
)
def test_every_kind_of_features(stock, photo, tmp_path, visual):
    visual = {"path": str(write_clip(tmp_path / "clip"))} if visual == "clip" else visual
    folder = stock(visual=visual)
    model = load_checkpoint(folder)
    other = LlavaForConditionalGeneration.from_pretrained(folder)
    pixels = model.processor.transform(Image.open(photo).convert("RGB"))[None]
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question(QUESTION, 1)])[0]])
    with torch.no_grad():
        theirs = other(pixel_values=pixels, input_ids=ids).logits
        torch.testing.assert_close(model(pixels, ids).logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompt_and_decoding_are_read_back(stock, prompt):
    settings = {"max_new_tokens": 9, "repetition_penalty": 1.3}
    config = load_checkpoint(stock(prompt=prompt, generate=settings)).config
    assert config.prompt == Prompt(**prompt)
    assert (config.generate.max_new_tokens, config.generate.repetition_penalty) == (9, 1.3)


def train_on(backbones, folder, tmp_path, **sections):
    needed = {
        "visual": {"path": str(folder), "feature": "last"},
        "llm": {"path": str(folder), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}},
    }
    train = {
        "init_from": str(folder),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "projector_lr": 1e-2,
        "lora_lr": 1e-2,
    }
    sections = {"train": train} | needed | sections
    return Trainer(tiny_config(backbones, **sections))


def test_training_starts_where_the_export_ended(backbones, stock, photo, tmp_path):
    folder = stock()
    expected = Answerer(load_checkpoint(folder)).answer(photo, QUESTION)
    trainer = train_on(backbones, folder, tmp_path)
    assert Answerer(trainer.model.eval()).answer(photo, QUESTION) == expected  # its new LoRA adds nothing yet
    checkpoint = trainer.run()
    again = load_checkpoint(checkpoint, overrides={"model_root": tmp_path})
    assert Answerer(again).answer(photo, QUESTION) == Answerer(trainer.model.eval()).answer(photo, QUESTION)
    projector = load_file(folder / WEIGHTS)["multi_modal_projector.linear_1.weight"]
    assert not torch.equal(again.feature_proj[0].weight, projector)
    written = write_export(again, tmp_path / "second", "llava", FACTS)
    assert check_export(written)["passed"]


@pytest.mark.parametrize(
    "sections",
    [
        {"visual": {"path": "siglip"}},
        {"llm": {"path": "qwen"}},
        {"visual": {"path": "stock", "feature": "output"}},
        {"visual": {"path": "stock", "feature": "last", "drop": "none"}},
        {"projector": {"kind": "pixel_shuffle"}},
    ],
    ids=str,
)
def test_other_parts_than_its_own_are_refused(backbones, stock, tmp_path, sections):
    folder = stock()
    places = {"siglip": str(backbones / "siglip"), "qwen": str(backbones / "qwen"), "stock": str(folder)}
    for section in sections.values():
        if "path" in section:
            section["path"] = places.get(section["path"], section["path"])
    message = rf"belongs to its own encoder and language model: set visual.path={folder} llm.path={folder} .*drop=first"
    with pytest.raises(UserError, match=message):
        train_on(backbones, folder, tmp_path, **sections)


def edit(folder, **values):
    """Change config.json; a value None removes the key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava_next"}, "is a model of type 'llava_next': of stock models, only llava is read"),
        ({"vision_feature_layer": [-2, -1]}, r"layer \[-2, -1\], 'default'; only the layers -1 and -2"),
        ({"vision_feature_layer": 3}, "layer 3"),
        ({"projector_hidden_act": "relu"}, "activation 'relu'"),
        ({"multimodal_projector_bias": False}, "no bias"),
        ({"vision_config__model_type": "sam"}, "its image encoder is of type 'sam', and only siglip"),
        ({"text_config__model_type": "mamba"}, "its language model is of type 'mamba', and only qwen"),
    ],
)
def test_unknown_parts_are_named(stock, values, message):
    folder = stock()
    edit(folder, **values)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_newline", "left over: image_newline"),
        ("multi_modal_projector.norm.weight", "left over: norm.weight"),
        ("language_model.model.layers.0.mlp.experts.weight", "left over: .*experts"),
        ("vision_tower.vision_model.adapter.weight", "left over: .*adapter"),
    ],
)
def test_unknown_tensors_are_named(stock, name, message):
    folder = stock()
    save_file(load_file(folder / WEIGHTS) | {name: torch.zeros(2)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_another_prompt_format_is_refused_for_answering_only(backbones, stock, tmp_path):
    folder = stock()
    for file in ("chat_template.json", "chat_template.jinja"):
        template = (
            (folder / file)
            .read_text()
            .replace("<|im_start|>user\\n", "USER: ")
            .replace("<|im_start|>user\\\\n", "USER: ")
        )
        (folder / file).write_text(template)
    with pytest.raises(UserError, match="its chat template is not the format of qwen/chat.py .* train.init_from"):
        load_checkpoint(folder)
    train_on(backbones, folder, tmp_path)


def test_the_names_that_transformers_5_writes_are_read_too(stock, photo, tmp_path):
    """Its own save_pretrained names the tensors otherwise and keeps the image processor elsewhere."""
    folder = stock()
    expected = Answerer(load_checkpoint(folder)).answer(photo, QUESTION)
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    new = LlavaForConditionalGeneration(
        loaded.config
    )  # one that was loaded is saved under the names that it was loaded by
    new.load_state_dict(loaded.state_dict())
    new.save_pretrained(tmp_path / "again")
    names = set(load_file(tmp_path / "again" / WEIGHTS))
    assert not any(name.startswith("vision_tower.vision_model.") for name in names)
    for file in folder.iterdir():
        if file.name not in {WEIGHTS, "config.json", "preprocessor_config.json"}:
            shutil.copy(file, tmp_path / "again")
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text()) | {"image_processor": pixels}
    (tmp_path / "again" / "processor_config.json").write_text(json.dumps(processor))
    assert Answerer(load_checkpoint(tmp_path / "again")).answer(photo, QUESTION) == expected


def test_checkpoints_know_their_features(backbones, tiny_checkpoint, tmp_path):
    model = MMultiModal.from_config(tiny_config(tiny_checkpoint.parent.parent, visual={"feature": "last"}))
    with pytest.raises(UserError, match=r"was trained with visual.feature=output: set it so"):
        restore_weights(model, tiny_checkpoint)


def test_an_image_token_of_another_name(stock, photo):
    """As published LLaVA models have it: `<image>`, in tokenizer, template and config."""
    folder = stock()
    expected = Answerer(load_checkpoint(folder)).answer(photo, QUESTION)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<image>", "<picture>").replace("<|extra_0|>", "<image>"))
    assert "<|extra_0|>" not in AutoTokenizer.from_pretrained(folder).get_vocab()
    assert Answerer(load_checkpoint(folder)).answer(photo, QUESTION) == expected


def test_decoding_settings_are_those_of_transformers(stock):
    folder = stock(generate={"num_beams": 3, "length_penalty": 0.5})
    read = load_checkpoint(folder).config.generate
    assert (read.num_beams, read.length_penalty, read.temperature) == (3, 0.5, 0)
    settings = '{"do_sample": true, "top_k": 1, "temperature": 0.7, "top_p": 0.8}'  # sampling among one token is greedy
    (folder / "generation_config.json").write_text(settings, encoding="utf-8")
    read = load_checkpoint(folder).config.generate
    assert (read.temperature, read.top_k, read.num_beams) == (0, 0, 1)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.8}', encoding="utf-8")
    read = load_checkpoint(folder).config.generate
    assert (read.temperature, read.top_k, read.top_p, read.num_beams) == (1.0, 50, 0.8, 1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if not key.startswith("image_token_i")}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json has no image_token_index"):
        load_checkpoint(folder)
