"""The files of `--format gguf` hold our weights, and llama.cpp answers the same with them."""

import json
import shutil
from unittest.mock import MagicMock

import pytest
import torch
from jinja2 import Environment

import export as script
from config import IMAGE_TAG
from errors import UserError
from exporting import gguf_files, parity
from exporting.targets import TARGETS
from exporting.template import llama_cpp_template
from tests.tiny import write_clip, write_qwen

# Differences of logits, in standard deviations. llama.cpp takes GELU from a table of float16 values, whose rounding is
# 5e-4, in each of a few layers. Without a photo, the same float32 numbers are summed in another order.
TABLE, EXACT = 1e-2, 2e-5
TEXT = "Sei kurz: it's 1234 567,  two   spaces\n\n here. 图中有什么？ naïve I'LL (x)"
MERGES = ("h e", "t h", "th e", "Ġ t", "Ġt he", "1 2", "12 3", "i n", "Ġ Ġ", "' s", "i t", "Ċ Ċ", "Ġ in", "Ġ 1", "a n")


def given(make, folder, kind="qwen2", steps=None, visual=None, **settings):
    """A model whose tokenizer has merges, which llama.cpp needs, and cuts a text by `steps`."""
    tied, wide = settings.pop("tied", True), settings.pop("wide", {})
    if kind != "qwen1":
        write_qwen(folder / "llm", kind, tied, merges=MERGES, **wide)
        settings["llm"] = {"path": str(folder / "llm")}
    if steps is not None:
        file = folder / "llm" / "tokenizer.json"
        core = json.loads(file.read_text(encoding="utf-8")) | {"pre_tokenizer": steps}
        file.write_text(json.dumps(core), encoding="utf-8")
    settings.setdefault("generate", {"max_new_tokens": 6})
    return make("qwen1", visual={"drop": "none"} | (visual or {}), **settings)


def tensors_in(file):
    gguf = pytest.importorskip("gguf")
    return {
        tensor.name: (torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(file).tensors
    }


def fields_of(file):
    return {name: field.contents() for name, field in pytest.importorskip("gguf").GGUFReader(file).fields.items()}


def written(model, folder, weights=""):
    """The files, without the comparison."""
    pytest.importorskip("gguf")
    target, pixels = TARGETS["gguf"], torch.rand(1, 3, *model.encoder.size)
    target.check(model)
    folder.mkdir()
    target.quantised.get(weights, target.write)(model, pixels, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_files_hold_our_weights(make, tmp_path, dtype):
    model = given(make, tmp_path, tied=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = written(model, tmp_path / "out")
    name = gguf_files.TYPES[dtype]
    text, vision = tensors_in(folder / f"model-{name}.gguf"), tensors_in(folder / "mmproj.gguf")
    state, encoder, projector = (
        part.state_dict() for part in (model.language_model, model.encoder, model.feature_proj)
    )
    layer = "model.layers.1.self_attn.v_proj"
    for new, old, found in (
        ("token_embd.weight", state["model.embed_tokens.weight"], text),
        ("output.weight", state["lm_head.weight"], text),
        ("output_norm.weight", state["model.norm.weight"], text),
        ("blk.1.attn_v.weight", state[f"{layer}.base_layer.weight"], text),  # merged by `write`
        ("blk.1.attn_v.bias", state[f"{layer}.base_layer.bias"], text),
        ("v.patch_embd.weight", encoder["embeddings.patch_embedding.weight"], vision),
        ("v.position_embd.weight", encoder["embeddings.position_embedding.weight"], vision),
        ("v.post_ln.bias", encoder["post_layernorm.bias"], vision),
        ("v.blk.0.ffn_down.weight", encoder["encoder.layers.0.mlp.fc2.weight"], vision),
        ("mm.0.weight", projector["0.weight"], vision),
        ("mm.2.bias", projector["2.bias"], vision),
    ):
        tensor, kind = found[new]
        torch.testing.assert_close(tensor.float(), old.float(), rtol=0, atol=0)
        vector = old.dim() == 1 or "position" in new
        assert kind == ("F32" if vector else name.upper()), new
    assert len(text) == sum(".lora_" not in key for key in state)
    assert len(vision) == len(encoder) + len(projector)


def test_8_bit_weights(make, tmp_path):
    """Blocks of 32 numbers share a scale: each is off by half a step, 1 / 254 of the block's largest, at most."""
    model = given(make, tmp_path)
    folder = written(model, tmp_path / "out", "q8_0")
    text = tensors_in(folder / "model-q8_0.gguf")
    weight = model.language_model.state_dict()["model.layers.0.mlp.gate_proj.base_layer.weight"]
    tensor, kind = text["blk.0.ffn_gate.weight"]
    assert kind == "Q8_0"
    step = weight.abs().amax(1, keepdim=True) / 127  # 32 columns, so a row is a block
    assert ((tensor - weight).abs() <= step * 0.55).all()  # half a step, and the scale is a float16
    assert not torch.equal(tensor, weight)
    assert text["blk.0.ffn_down.weight"][1] == "F16"  # rows of 48 are no blocks
    assert text["blk.0.attn_norm.weight"][1] == "F32"
    assert tensors_in(folder / "mmproj.gguf")["mm.0.weight"][1] == "F32"


# type of a matrix of 32 columns, and of one with a whole block of 256; the steps between its values, as a share of the
# largest value of a row
@pytest.mark.parametrize(("width", "kind", "step"), [(32, "Q5_0", 1 / 16), (256, "Q4_K", 1 / 7)])
def test_a_mixture_of_4_and_6_bits(make, tmp_path, width, kind, step):
    pytest.importorskip("cyllama")
    wide = {"hidden_size": width, "intermediate_size": 48}
    model = given(make, tmp_path, wide=wide)
    folder = written(model, tmp_path / "out", "q4_k_m")
    assert sorted(path.name for path in folder.glob("*.gguf")) == ["mmproj.gguf", "model-q4_k_m.gguf"]
    text = tensors_in(folder / "model-q4_k_m.gguf")
    weight = model.language_model.state_dict()["model.layers.0.mlp.gate_proj.base_layer.weight"]
    tensor, found = text["blk.0.ffn_gate.weight"]
    assert found == kind
    # llama.cpp chooses scales by the sum of squares, so a single number may be off by a whole step
    assert ((tensor - weight).abs() <= step * weight.abs().amax(1, keepdim=True)).all()
    assert not torch.equal(tensor, weight)
    assert text["blk.0.attn_norm.weight"][1] == "F32"


def test_a_full_disk_keeps_the_file_that_is_quantised(tmp_path, monkeypatch):
    source = tmp_path / "model-f16.gguf"
    source.write_bytes(b"weights")
    library = MagicMock()
    library.model_quantize.side_effect = RuntimeError("llama_model_quantize failed with code 1")
    monkeypatch.setattr(gguf_files.importlib, "import_module", lambda _: library)
    with pytest.raises(OSError, match=r"could not write model-q4_k_m.gguf, probably because the disk is full"):
        gguf_files._quantise(library, source, tmp_path / "model-q4_k_m.gguf")
    assert source.is_file()


def test_the_metadata_are_the_models(make, tmp_path):
    model = given(make, tmp_path, generate={"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1})
    folder = written(model, tmp_path / "out")
    text, vision = fields_of(folder / "model-f32.gguf"), fields_of(folder / "mmproj.gguf")
    tokenizer, config = model.processor.tokenizer, model.language_model.config
    tokens, kinds = text["tokenizer.ggml.tokens"], text["tokenizer.ggml.token_type"]
    assert len(tokens) == config.vocab_size
    for token, kind in ((IMAGE_TAG, 3), ("<|im_end|>", 3), ("<think>", 4), ("Ġthe", 1), (f"[PAD{len(tokens) - 1}]", 5)):
        assert kinds[tokens.index(token)] == kind, token  # 3 control, 4 added, 1 normal, 5 unused
    assert {token: number for token, number in tokenizer.get_vocab().items() if tokens[number] != token} == {}
    assert tuple(text["tokenizer.ggml.merges"]) == MERGES
    assert text["tokenizer.ggml.pre"] == "qwen2"
    assert text["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text["tokenizer.ggml.suppress_tokens"] == model.suppressed_ids
    assert text["general.architecture"] == "qwen2"
    assert text["qwen2.attention.head_count_kv"] == config.num_key_value_heads
    assert text["qwen2.rope.freq_base"] == config.rope_parameters["rope_theta"]
    assert [round(text[f"general.sampling.{key}"], 6) for key in ("temp", "top_k", "penalty_repeat")] == [0.7, 5, 1.1]
    assert vision["clip.projector_type"] == "mlp"
    assert vision["clip.vision.feature_layer"] == [model.encoder.config.num_hidden_layers]
    assert vision["clip.vision.image_size"] == model.encoder.size[0]
    assert vision["clip.use_gelu"] is True


def largest(report):
    return max(question["logits"] / question["logit_std"] for question in report["questions"])


def compared(export, model, **settings):
    for package in TARGETS["gguf"].packages:
        pytest.importorskip(package)
    folder, report = export(model, "gguf", **settings)
    assert report["passed"]
    assert all(question["ids_equal"] and question["same"] for question in report["questions"])
    return folder, report


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen1"])
def test_llama_cpp_answers_the_same(make, export, tmp_path, kind):
    model = given(
        make, tmp_path, kind, tied=kind == "qwen2", prompt={"system": TEXT, "question_prefix": "用中文回答："}
    )
    folder, report = compared(export, model)
    assert largest(report) < TABLE
    assert largest({"questions": [question for question in report["questions"] if "pixels" not in question]}) < EXACT
    assert report["versions"].keys() == {"xllamacpp", "transformers"}
    assert "llama-server -m model-f32.gguf" in (folder / "README.md").read_text()


@pytest.mark.parametrize("feature", ["last", "penultimate"])
def test_llama_cpp_takes_the_same_layer(make, export, tmp_path, feature):
    model = given(make, tmp_path, visual={"feature": feature}, prompt={"image_first": True})
    _, report = compared(export, model)
    assert largest(report) < TABLE


@pytest.mark.parametrize("name", gguf_files.PRE_TOKENIZERS)
def test_a_text_is_cut_the_same(make, export, tmp_path, name):
    steps = {"type": "Sequence", "pretokenizers": gguf_files.PRE_TOKENIZERS[name]}
    # transformers keeps the steps of a Llama's file, and replaces those of a Qwen2's
    model = given(make, tmp_path, "llama", steps, prompt={"system": TEXT}, generate={"max_new_tokens": 1})
    assert gguf_files.pre_tokenizer(model) == name
    compared(export, model)


def test_llama_cpp_reads_8_bit_weights(make, export, tmp_path):
    pytest.importorskip("xllamacpp")
    _, report = export(given(make, tmp_path), "gguf", weights="q8_0")
    assert report["weights"] == "q8_0"
    assert largest(report) > TABLE


def test_llama_cpp_reads_4_bit_weights(make, export, tmp_path):
    for package in ("xllamacpp", "cyllama"):
        pytest.importorskip(package)
    _, report = export(given(make, tmp_path), "gguf", weights="q4_k_m")
    assert report["weights"] == "q4_k_m"
    assert largest(report) > TABLE


def test_a_wrong_file_is_noticed(make, export, tmp_path, monkeypatch):
    """Without SigLIP's last layer norm, llama.cpp has other features."""
    for package in TARGETS["gguf"].packages:
        pytest.importorskip(package)
    whole = gguf_files.vision_tensors
    monkeypatch.setattr(
        gguf_files,
        "vision_tensors",
        lambda model: {name: tensor for name, tensor in whole(model).items() if "post_layernorm" not in name},
    )
    with pytest.raises(UserError, match="not the same .*logits differ"):
        export(given(make, tmp_path), "gguf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual": {"drop": "first"}}, "'visual.drop' is first.*train with visual.drop=none"),
        ({"visual": {"tiles": 4}}, "train with visual.tiles=0"),
        ({"projector": {"kind": "pixel_shuffle"}}, "trained with projector.kind=mlp"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(make, settings, message):
    settings = settings | {"visual": {"drop": "none"} | settings.get("visual", {})}
    with pytest.raises(UserError, match=message):
        TARGETS["gguf"].check(make(**settings))


def test_other_numbers_are_refused(make):
    model = make(visual={"drop": "none"})
    model.encoder.config.hidden_act = "gelu"
    with pytest.raises(UserError, match="computes with 'gelu'.*use --format llava"):
        TARGETS["gguf"].check(model)
    model = make(visual={"drop": "none"})
    model.language_model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(UserError, match="'yarn'.*use --format llava"):
        TARGETS["gguf"].check(model)


def test_an_unknown_tokenizer_is_refused(make, backbones, tmp_path):
    folder = shutil.copytree(backbones / "llama-tied", tmp_path / "llm")
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    core["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "\\p{N}{1,3}"}
    (folder / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    with pytest.raises(UserError, match="llama.cpp has no name for.*use --format llava"):
        TARGETS["gguf"].check(make(visual={"drop": "none"}, llm={"path": str(folder)}))


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"image_first": True, "question_prefix": "Q: "},
        {"question_prefix": "Q: "},
        {"question_prefix": "Q: ", "newline_before_text": True},
    ],
)
@pytest.mark.parametrize("marker", ["<__media__>", "<__media_Ab3__>"])
def test_the_template_puts_photos_first(make, prompt, marker):
    """llama.cpp writes a marker at each photo, in a string or in a part of its own."""
    model = make(prompt=prompt)
    chat, template = model.processor.chat, Environment().from_string(llama_cpp_template(model))
    asked, tokens = "Is <this> it?\n", model.processor.chat.plan.crop_tokens
    for photos in (0, 1, 2):
        ids, _ = chat.render([chat.typed_question(asked, photos)])
        expected = model.processor.tokenizer.decode(ids).replace(IMAGE_TAG * tokens, marker)
        parts = [{"type": "text", "text": asked}, *[{"type": "media_marker", "text": marker}] * photos]
        for content in (asked + marker * photos, marker * photos + asked, f"{marker}\n" * photos + asked, parts):
            messages = [{"role": "user", "content": content}]
            assert template.render(messages=messages, add_generation_prompt=True) == expected


def test_questions_with_a_photo_in_their_middle_are_not_asked(make, backbones, tmp_path):
    captions = (backbones / "captions.json").read_text(encoding="utf-8")
    (tmp_path / "captions.json").write_text(captions.replace("<|extra_0|>\\nWhich", "Which <|extra_0|>"))
    model = make(data={"val_fraction": 0.9, "captions": str(tmp_path / "captions.json")})
    texts = [
        [case.stock_messages[0]["content"] for case in parity._real_cases(model, first)] for first in (False, True)
    ]
    assert any("Which <image>" in text for text in texts[0])
    assert set(texts[1]) == {"<image>\nIs it red?"}


def test_clip_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="class token llama.cpp puts at a wrong place.*train with SigLIP"):
        TARGETS["gguf"].check(make(visual={"path": str(write_clip(tmp_path / "clip"))}))


def test_weights_that_a_format_does_not_have(tmp_path):
    with pytest.raises(UserError, match="--weights q8_0: only --format gguf has such weights"):
        script.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--weights", "q8_0"])
