"""The report's checkpoint layout, written small: it answers, trains on and exports; what does not fit is refused."""

import json
import pickle

import pytest
import torch
from PIL import Image

from export import main as export_main
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import read_config
from predict import main as predict_main
from tests.tiny import IMAGE_SIZE, tiny_config, write_qwen, write_qwen1, write_records, write_siglip
from training.loop import Trainer

RANK, ALPHA = 4, 8
SHAPES = {
    "attn.c_attn": (32, 96),
    "mlp.w1": (32, 48),
    "mlp.w2": (32, 48),
    "attn.c_proj": (32, 32),
    "mlp.c_proj": (48, 32),
}


def write_report_checkpoint(folder, targets=("c_attn", "w1", "w2"), **settings):
    """As the report's trainer saved it: LoRA on fused matrices, bf16, marked as from a GPU; returns the tensors."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    adapter = {}
    for layer in range(2):
        for name, (inputs, outputs) in SHAPES.items():
            if name.rpartition(".")[2] in targets:
                key = f"base_model.model.transformer.h.{layer}.{name}"
                adapter[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator).bfloat16() / 4
                adapter[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator).bfloat16() / 4
    projector = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {name: torch.randn(shape, generator=generator).bfloat16() / 4 for name, shape in projector.items()}
    location = torch.serialization.location_tag
    try:
        torch.serialization.location_tag = lambda storage: "cuda:0"
        torch.save(adapter, folder / "adapter_model.bin")
        torch.save(projector, folder / "other_params.bin")
    finally:
        torch.serialization.location_tag = location
    (folder / "training_args.bin").write_bytes(b"never opened")
    config = {"base_model_name_or_path": "Qwen/Qwen-7B-Chat", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1}
    config |= {"target_modules": list(targets), "use_dora": False, "bias": "none", "rank_pattern": {}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapter, projector


@pytest.fixture
def folder(tmp_path):
    write_siglip(tmp_path / "siglip")
    write_qwen1(tmp_path / "qwen")
    return tmp_path


def load(folder, **overrides):
    bases = {"visual.path": folder / "siglip", "llm.path": folder / "qwen", "visual.image_tokens": 15}
    return load_checkpoint(folder / "report", device="cpu", overrides=bases | overrides, merge_lora=False)


@pytest.mark.parametrize("targets", [("c_attn", "w1", "w2"), ("c_attn", "c_proj", "w1", "w2")])
@torch.no_grad()
def test_fused_lora_equals_its_sum_with_the_fused_weights(folder, targets):
    adapter, projector = write_report_checkpoint(folder / "report", targets)
    expected = write_qwen1(folder / "again")
    for name, B in adapter.items():
        if "lora_B" not in name:
            continue
        layer, block, linear = name.split(".")[4:7]
        change = ALPHA / RANK * B.float() @ adapter[name.replace("lora_B", "lora_A")].float()
        parts = {"c_attn": ["q_proj", "k_proj", "v_proj"], "w1": ["up_proj"], "w2": ["gate_proj"]}.get(
            linear, ["o_proj" if block == "attn" else "down_proj"]
        )
        module = expected.model.layers[int(layer)].get_submodule("self_attn" if block == "attn" else "mlp")
        for part, rows in zip(parts, change.chunk(len(parts)), strict=True):
            module.get_submodule(part).weight += rows
    model = load(folder)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(None, ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, projector[name].float()) for name, tensor in model.feature_proj.state_dict().items())


def test_its_conventions_come_with_it(folder):
    write_report_checkpoint(folder / "report")
    config = read_config(folder / "report")
    assert config.llm.path == "Qwen/Qwen-7B-Chat"
    assert config.visual.path == "google/siglip-so400m-patch14-384"
    assert (config.llm.lora.r, config.llm.lora.alpha, config.llm.lora.dropout) == (RANK, ALPHA, 0.1)
    assert config.generate.repetition_penalty == 1.1
    model = load(folder)
    ids, _ = model.processor.chat.render([model.processor.chat.typed_question("图中有什么？", 1)])
    text = model.processor.tokenizer.decode(ids).replace("<|extra_0|>" * 15, "<|extra_0|>")
    assert text == (
        "<|im_start|>system\n你是一位图像理解助手。<|im_end|>\n<|im_start|>user\n"
        "用中文回答：<|extra_0|>\n图中有什么？<|im_end|>\n<|im_start|>assistant\n"
    )
    _, labels = model.processor.chat.render(
        [model.processor.chat.typed_question("?", 1), model.processor.chat.answer("树")]
    )
    assert labels[-2] == model.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_training_goes_on_from_it(folder):
    write_report_checkpoint(folder / "report")
    write_records(folder)
    saved = load(folder)
    prompt = saved.config.prompt.model_dump()
    lora = saved.config.llm.lora.model_dump() | {"dropout": 0.0}
    config = tiny_config(
        folder, prompt=prompt, llm={"lora": lora}, train={"init_from": str(folder / "report"), "max_steps": 2}
    )
    trainer = Trainer(config)
    before = {
        name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters() if tensor.requires_grad
    }
    reference = dict(saved.named_parameters())
    assert all(torch.equal(tensor, reference[name]) for name, tensor in before.items())
    checkpoint = trainer.run()
    after = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    again = load_checkpoint(checkpoint, overrides={"model_root": folder}, merge_lora=False)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.named_parameters() if name in after)


def test_scripts_take_it(folder, capsys, same_process):
    write_report_checkpoint(folder / "report")
    Image.new("RGB", (70, 60), (200, 30, 30)).save(folder / "photo.png")
    bases = [f"visual.path={folder / 'siglip'}", f"llm.path={folder / 'qwen'}", "visual.image_tokens=15"]
    question = ["--image", str(folder / "photo.png"), "--question", "图中有什么？", "generate.max_new_tokens=5"]
    predict_main(["--checkpoint", str(folder / "report"), *question, *bases])
    answer = capsys.readouterr().out
    assert answer.strip()
    export_main(["--checkpoint", str(folder / "report"), "--output", str(folder / "out"), *bases])
    assert (folder / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", ["adapter_model.bin", "other_params.bin"])
def test_a_pickle_that_runs_code_is_not_run(folder, name):
    write_report_checkpoint(folder / "report")

    class Harmful:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    torch.save({"0.weight": Harmful()}, folder / "report" / name)
    with pytest.raises(ValueError, match=rf"{name}: not a plain file of tensors, nothing of it was run"):
        load(folder)
    (folder / "report" / name).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=rf"{name}: not a plain file of tensors"):
        load(folder)
    assert not (folder / "executed").exists()


def test_what_does_not_fit_is_refused(folder):
    write_report_checkpoint(folder / "report")
    write_qwen1(folder / "wide", hidden_size=64)
    with pytest.raises(ValueError, match=r"adapter_model.bin does not fit the model: .*lora_A.weight is \(4, 32\)"):
        load(folder, **{"llm.path": folder / "wide"})
    write_qwen(folder / "qwen2")  # two heads of keys and values where the adapter has four
    with pytest.raises(ValueError, match=r"adapter_model.bin does not fit"):
        load(folder, **{"llm.path": folder / "qwen2"})
    with pytest.raises(ValueError, match="'llm.lora' differs from the adapter .* r=4, alpha=8"):
        load(folder, **{"llm.lora.alpha": 16})
    (folder / "report" / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint, it lacks adapter_model.bin"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"target_modules": ["q_proj"]}, "LoRA on q_proj; known are c_attn, c_proj, w1, w2"),
    ],
)
def test_other_adapters_are_refused(folder, settings, message):
    write_report_checkpoint(folder / "report", **settings)
    with pytest.raises(ValueError, match=message):
        load(folder)


@torch.no_grad()
def test_pictures_go_through_it(folder):
    write_report_checkpoint(folder / "report")
    model = load(folder)
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question("?", 1)])[0]])
    red, green = torch.zeros(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert not torch.equal(model(red, ids).logits, model(green + 1, ids).logits)
