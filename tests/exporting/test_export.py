"""An exported folder is a stock model with the same features, logits and answers; what is not the same is said."""

import json
import re

from cli import run_script

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import export as script
from answering.answer import Answerer
from errors import UserError
from exporting.write import check_export, write_export
from model.checkpoint import save_checkpoint
from model.model import MMultiModal
from tests.exporting.conftest import FACTS
from tests.tiny import tiny_config, write_clip, write_qwen, write_siglip

STOCK = ["llava", "vipllava"]
LANGUAGE_MODELS = ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-untied", "qwen1"]
# Both sides use float32 and the same weights, and sum in another order: 1e-5 is 100 ulp of logits of size 1 to 10.
EXACT = 1e-5
# x / c² with c = 2^7 is left of what the folded norm stands beside: 6e-5 of x
FOLDED = 1e-3


def worst(report, key):
    return max(question.get(key, 0.0) for question in report["questions"])


def shown(model):
    """A photo, our answer on it, and what a stock model needs for the same."""
    photo, chat = Image.new("RGB", (80, 60), (30, 160, 90)), model.processor.chat
    ids = torch.tensor([chat.render([chat.typed_question("What is it?", 1)])[0]])
    return Answerer(model).answer(photo, "What is it?"), model.processor.transform(photo)[None], ids


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("target", STOCK)
def test_every_language_model_answers_the_same(make, export, name, target):
    model = make(name, prompt={"system": "Sei kurz. it's", "question_prefix": "用中文回答："})
    expected, pixels, ids = shown(model)
    folder, report = export(model, target)
    assert report["passed"]
    assert [question["theirs"] for question in report["questions"]] == [
        question["ours"] for question in report["questions"]
    ]
    assert worst(report, "features") < (FOLDED if target == "llava" else EXACT)
    stock = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    exported = stock.from_pretrained(folder)
    tokens = exported.generate(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) == expected


@pytest.mark.parametrize("drop", ["first", "none"])
@pytest.mark.parametrize("feature", ["output", "last", "penultimate"])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_every_kind_of_features_is_the_same(make, export, tmp_path, kind, feature, drop):
    folder = {"siglip": write_siglip, "clip": write_clip}[kind](tmp_path / kind)
    model = make(visual={"path": str(folder), "feature": feature, "drop": drop})
    _, report = export(model)
    folds = kind == "siglip" and feature == "output"
    assert 0 < worst(report, "features") < FOLDED if folds else worst(report, "features") < EXACT
    assert worst(report, "logits") < (FOLDED * 20 if folds else EXACT * 10)
    assert (report["error of the conversion"] > 0) == folds


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trained_encoder_is_exported(make, export, mode):
    model = make(parts={"vision": {"mode": mode, "lr": 1e-3}, "llm": {"mode": "full", "lr": 1e-3}})
    before = model.encode_image(torch.ones(1, 3, *model.encoder.size))
    _, report = export(model)
    assert report["passed"]
    assert worst(report, "features") < FOLDED
    untrained = make().encode_image(torch.ones(1, 3, *model.encoder.size))
    assert not torch.allclose(before, untrained, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", STOCK)
def test_16_bit_weights(make, export, dtype, target):
    model = make()
    for parameter in model.parameters():  # not the frequencies of the rotary embedding
        parameter.data = parameter.data.to(dtype)
    folder, report = export(model, target)
    assert report["passed"]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype")} == {str(dtype).removeprefix("torch.")}


def test_a_large_model_is_cut_into_shards(make, export, monkeypatch):
    monkeypatch.setattr("exporting.folder.SHARD_SIZE", "30KB")
    folder, _ = export(make("qwen2-untied"))
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    table = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(table["weight_map"].values())) == shards
    assert len(shards) > 2


def test_the_folder_is_that_of_older_programs_too(make, export, backbones):
    """Names and keys that transformers 4, vLLM and others read (the writer's rules in docs/carrying.md)."""
    folder, _ = export(make("qwen2-untied"))
    names = load_file(folder / "model.safetensors")
    assert {"vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.lm_head.weight"} <= set(
        names
    )
    assert "language_model.model.embed_tokens.weight" in names
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["extra_special_tokens"] == {"image_token": "<|extra_0|>"}
    assert "<|im_end|>" in tokenizer["additional_special_tokens"]
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    assert (pixels["crop_size"], pixels["do_center_crop"]) == ({"height": 56, "width": 56}, False)
    template = (folder / "chat_template.jinja").read_text()
    assert json.loads((folder / "chat_template.json").read_text())["chat_template"] == template
    assert tokenizer["chat_template"] == template
    for file in folder.iterdir():  # the hub's readers have no use for a path of this machine
        assert str(backbones).encode() not in file.read_bytes(), file.name


def test_greedy_decoding_travels_to_programs_that_do_not_read_do_sample(make, export):
    """vLLM samples at temperature 1 unless `top_k` tells it otherwise; transformers must give the greedy answer too."""
    model = make(generate={"max_new_tokens": 7})
    expected, pixels, ids = shown(model)
    folder, _ = export(model)
    assert "vLLM" not in (folder / "README.md").read_text(encoding="utf-8")
    raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert (raw["do_sample"], raw["top_k"]) == (True, 1)
    assert "temperature" not in raw
    exported = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = exported.generate(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) == expected
    exported.save_pretrained(folder / "again")  # refused for settings that contradict each other


def test_decoding_settings_travel(make, export):
    model = make(generate={"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.2})
    folder, report = export(model)
    assert report["passed"]  # with the penalty on both sides
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature) == (7, True, 0.5)
    assert (settings.top_p, settings.repetition_penalty) == (0.9, 1.2)
    assert settings.suppress_tokens == model.suppressed_ids
    folder, report = export(make(generate={"max_new_tokens": 7, "num_beams": 3, "length_penalty": 0.5}), name="beams")
    assert report["passed"]
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.num_beams, settings.length_penalty) == (3, 0.5)
    # vLLM has no beams and would sample: the card says how to serve it
    assert "--override-generation-config '{\"temperature\": 0}'" in (folder / "README.md").read_text(encoding="utf-8")


def test_auto_is_the_dtype_of_the_language_model_s_folder(tmp_path, same_process, monkeypatch):
    write_siglip(tmp_path / "siglip")
    stock = transformers.Qwen2ForCausalLM.from_pretrained(write_qwen(tmp_path / "qwen"), dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "qwen")
    model = MMultiModal.from_config(tiny_config(tmp_path))
    save_checkpoint(model, tmp_path / "checkpoint-1", {"step": 1}, {}, {})
    options = ["--checkpoint", str(tmp_path / "checkpoint-1"), f"model_root={tmp_path}", "generate.max_new_tokens=2"]
    for dtype, name in ((torch.bfloat16, "auto"), (torch.float32, "float32")):
        script.main([*options, "--output", str(tmp_path / name), "--dtype", name])
        assert {value.dtype for value in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}

    def stop(model, *_):
        assert next(model.parameters()).dtype == torch.float32  # graphs are not written in bfloat16
        raise UserError("seen")

    monkeypatch.setattr(script, "write_export", stop)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: True)  # what would write the graph may be absent
    with pytest.raises(UserError, match="seen"):
        script.main([*options, "--output", str(tmp_path / "graph"), "--format", "onnx"])


def test_the_command_says_what_vllm_does_with_beams(tiny_checkpoint, tmp_path, same_process, capsys):
    options = ["--checkpoint", str(tiny_checkpoint), f"model_root={tiny_checkpoint.parent.parent.parent}"]
    for name, beams in (("greedy", 1), ("beams", 2)):
        output = tmp_path / name
        script.main([*options, "--output", str(output), f"generate.num_beams={beams}", "generate.max_new_tokens=2"])
        assert ("--override-generation-config" in capsys.readouterr().out) == (beams > 1)


BROKEN = {
    "the projector": "multi_modal_projector.linear_2.bias",
    "one encoder layer": "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    "one language layer": "language_model.model.layers.1.self_attn.o_proj.weight",
}


def broken(tensor, folder):
    """Add a tenth of its size to one tensor."""
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors[tensor].shape, generator=torch.Generator().manual_seed(0))
    tensors[tensor] += 0.1 * tensors[tensor].float().pow(2).mean().sqrt() * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tensor", BROKEN.values(), ids=BROKEN)
def test_a_wrong_weight_is_found_and_nothing_deleted(make, export, tmp_path, tensor):
    for number in (1, 2):
        with pytest.raises(UserError, match=rf"not the same \(question 1: .*do not use .*out.failed-{number}"):
            export(make("qwen2-untied"), change=lambda folder: broken(tensor, folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed-1", "out.failed-2"]
    report = json.loads((tmp_path / "out.failed-1" / "export_report.json").read_text())
    assert not report["passed"]
    assert (tmp_path / "out.failed-1" / "model.safetensors").is_file()
    assert "not the same" in (tmp_path / "out.failed-1" / "README.md").read_text()


def without(name, folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_template(folder):
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|im_start|>user", "<|im_start|>human"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: without("language_model.model.layers.0.mlp.up_proj.weight", folder), "missing_keys"),
        (lambda folder: change_json(folder / "preprocessor_config.json", resample=0), "its pixels differ"),
        (change_template, "other token ids"),
        (lambda folder: change_json(folder / "processor_config.json", patch_size=7), "other token ids"),
    ],
)
def test_other_files_are_compared_too(make, export, change, message):
    with pytest.raises(UserError, match=message):
        export(make(), change=change)


def test_a_wrong_export_ends_with_status_1(make, tmp_path, same_process):
    def main():
        written = write_export(make("qwen2-untied"), tmp_path / "out", "llava", FACTS)
        broken(BROKEN["the projector"], written.folder)
        check_export(written)

    with pytest.raises(SystemExit, match="error: the exported model is not the same") as end:
        run_script(main)
    assert end.value.code != 0


def test_a_folder_that_cannot_be_loaded_is_said(make, tmp_path):
    """In a process of its own, as always outside these tests."""
    written = write_export(make(), tmp_path / "out", "llava", FACTS)
    (written.folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"transformers cannot load or run it: .*out.failed-1"):
        check_export(written)
    assert "Traceback" in json.loads((tmp_path / "out.failed-1" / "export_report.json").read_text())["stderr"]


def test_an_encoder_too_narrow_to_fold_is_refused(make, export, tmp_path):
    folder = write_siglip(tmp_path / "siglip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 40
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if re.match(r"vision_model.*mlp\.fc1", name):
            tensors[name] = tensors[name][:40].contiguous()
        if re.match(r"vision_model.*mlp\.fc2\.weight", name):
            tensors[name] = tensors[name][:, :40].contiguous()
    tensors = {name: tensor for name, tensor in tensors.items() if "vision_model.head" not in name}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="needs an intermediate size of twice .* has 40 for 24: use --format vipllava"):
        export(make(visual={"path": str(folder)}))
    _, report = export(make(visual={"path": str(folder)}), "vipllava")
    assert report["passed"]


def test_a_residual_too_large_to_fold_is_refused(make, export):
    model = make()
    model.encoder.embeddings.patch_embedding.bias.data += 1e6
    with pytest.raises(UserError, match="would change the features by .*: use --format vipllava"):
        export(model)


def test_the_scale_grows_with_the_residual(make, export):
    model = make()
    small = export(model, name="small")[1]["error of the conversion"]
    model = make()
    model.encoder.embeddings.patch_embedding.bias.data += 300 * torch.randn(24)
    folder, report = export(model, name="large")
    assert report["error of the conversion"] < 5e-4
    assert small < 5e-4
    tensors = load_file(folder / "model.safetensors")
    assert tensors["vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight"].max() > 2**7
