"""The target `gguf`: two files for llama.cpp.

    model-<type>.gguf  the language model, with tokenizer, chat template, stop tokens and decoding settings
    mmproj.gguf        encoder and projector

Names and keys are those of llama.cpp's own converter; `<type>` is f32, f16, bf16, q8_0 or q4_k_m. llama.cpp gives the
language model every patch of a square picture and computes the projector's GELU by its tanh form.
"""

import functools
import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UserError
from exporting.folder import generation_settings, image_settings, text_config
from exporting.stock import ExportTarget, check_parts, merged_tensors, projector_tensors, vision_tensors
from exporting.template import llama_cpp_template
from model.model import MMultiModal
from qwen.tokenizer import QWEN1_PATTERN
from visual.SigLIP_VIT import SigLIPViT
from visual.transform import PREPROCESSOR_FILE

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
QWEN2_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN1_PATTERN}, "behavior": "Isolated", "invert": False}
# llama.cpp's name of how a tokenizer cuts a text before it joins letters → steps in tokenizer.json
PRE_TOKENIZERS = {
    "qwen2": [QWEN2_SPLIT, BYTES | {"use_regex": False}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "gpt-2": [BYTES | {"use_regex": True}],
}
MIXED = "q4_k_m"  # of 4-bit matrices and some of 6 bits, in blocks of 256 numbers; narrow ones get 5 or 8 bits
OTHERWISE = "or use --format llava, which other programs read"


def check(model: MMultiModal) -> None:
    """Raise UserError for a model that the files cannot hold."""
    check_parts(model)
    encoder, language_model = model.encoder, model.language_model
    if not isinstance(encoder, SigLIPViT):  # https://github.com/ggml-org/llama.cpp/issues/25814
        raise UserError(
            "'visual.path' is a CLIP encoder, whose class token llama.cpp puts at a wrong place, behind the patches: "
            f"train with SigLIP, {OTHERWISE}"
        )
    if encoder.dropped:
        raise UserError(
            f"'visual.drop' is {encoder.drop}, but llama.cpp gives the language model every patch: train with "
            f"visual.drop=none, {OTHERWISE}"
        )
    if encoder.config.hidden_act != "gelu_pytorch_tanh":
        raise UserError(
            f"the encoder computes with '{encoder.config.hidden_act}', and llama.cpp has GELU in its tanh form only: "
            "use --format llava"
        )
    rope = language_model.config.rope_parameters["rope_type"]
    if rope != "default" or any(window is not None for window in language_model.windows):
        raise UserError(
            f"'llm.path' has rotary positions of the kind '{rope}' or sliding windows, which the files are not written "
            "with: use --format llava"
        )
    pre_tokenizer(model)


def pre_tokenizer(model: MMultiModal) -> str:
    """Return llama.cpp's name of how the tokenizer cuts a text.

    Raises:
        UserError: it has none.
    """
    core = json.loads(model.processor.tokenizer.backend_tokenizer.to_str())
    steps = core["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    for name, known in PRE_TOKENIZERS.items():
        if core["model"]["type"] == "BPE" and steps == known:
            return name
    raise UserError(
        "'llm.path' has a tokenizer that llama.cpp has no name for here (known: "
        f"{', '.join(PRE_TOKENIZERS)}): use --format llava"
    )


@torch.no_grad()
def write(model: MMultiModal, pixels: torch.Tensor, folder: Path, quantised: str | None = None) -> float:
    """Write the folder; see `ExportTarget`. `quantised` is the type of the language model's matrices."""
    gguf = importlib.import_module("gguf")
    own, error = TYPES[model.encoder.dtype], _gelu_error(model, pixels)
    file = gguf.GGUFWriter(None, "clip")
    _add_encoder(file, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.encoder.config.num_hidden_layers)
    _write_file(gguf, file, folder / "mmproj.gguf", _encoder_tensors(model, names), own)
    config = text_config(model.language_model)
    file = gguf.GGUFWriter(None, config["model_type"])
    _add_language_model(file, config)
    _add_tokenizer(gguf, file, model, config["vocab_size"])
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    kind = own if quantised == MIXED else quantised or own
    path = folder / f"model-{kind}.gguf"
    _write_file(gguf, file, path, _text_tensors(model, config, names), kind)
    if quantised == MIXED:
        _quantise(gguf, path, folder / f"model-{MIXED}.gguf")
    for name, content in (
        (PREPROCESSOR_FILE, image_settings(model)),
        ("generation_config.json", generation_settings(model)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return error


def _quantise(gguf: Any, source: Path, output: Path) -> None:
    """Replace a file by one of the mixture `MIXED`, which only llama.cpp itself makes."""
    library = importlib.import_module("cyllama.llama.llama_cpp")
    library.disable_logging()  # a line for each matrix
    settings = library.LlamaModelQuantizeParams()
    settings.ftype = int(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    try:
        library.model_quantize(str(source), str(output), settings)
    except RuntimeError as error:  # it gives no reason, but `source` is whole
        raise OSError(None, f"llama.cpp could not write {output.name}, probably because the disk is full") from error
    source.unlink()


def _gelu_error(model: MMultiModal, pixels: torch.Tensor) -> float:
    """Relative error (root mean square) of the projector's output by the tanh form of its GELU."""
    rows = model.encode_image(pixels)
    ours, (first, _, second) = model.project(rows).float(), model.feature_proj
    theirs = second(nn.functional.gelu(first(rows), approximate="tanh")).float()
    return float((theirs - ours).norm() / ours.norm())


def _add_encoder(file: Any, model: MMultiModal) -> None:
    config, pixels = model.encoder.config, image_settings(model)
    file.add_type("mmproj")
    file.add_clip_has_vision_encoder(True)
    file.add_clip_projector_type("mlp")
    file.add_vision_projection_dim(model.language_model.config.hidden_size)
    file.add_vision_image_size(config.image_size)
    file.add_vision_patch_size(config.patch_size)
    file.add_vision_embedding_length(config.hidden_size)
    file.add_vision_feed_forward_length(config.intermediate_size)
    file.add_vision_block_count(config.num_hidden_layers)
    file.add_vision_head_count(config.num_attention_heads)
    file.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    file.add_vision_image_mean(pixels["image_mean"])
    file.add_vision_image_std(pixels["image_std"])
    file.add_vision_use_gelu(True)
    # without it, the last layer is left out
    file.add_array("clip.vision.feature_layer", [config.num_hidden_layers])


def _encoder_tensors(model: MMultiModal, names: Any) -> dict[str, torch.Tensor]:
    """Encoder and projector under llama.cpp's names; a layer norm behind the layers is used if it is there."""
    renamed = {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}
    used = model.encoder.feature == "output"
    found = {}
    for name, tensor in (vision_tensors(model) | projector_tensors(model)).items():
        stem, _, kind = name.rpartition(".")
        if ".post_layernorm." not in name or used:
            new = renamed[stem] + f".{kind}" if stem in renamed else names.get_name(name, (".weight", ".bias"))
            found[new] = tensor
    return found


def _add_language_model(file: Any, config: dict[str, Any]) -> None:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    file.add_type("model")
    file.add_vocab_size(config["vocab_size"])
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_key_length(width)
    file.add_value_length(width)
    file.add_rope_dimension_count(width)
    file.add_rope_freq_base(config["rope_theta"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _text_tensors(model: MMultiModal, config: dict[str, Any], names: Any) -> dict[str, torch.Tensor]:
    """The language model, LoRA merged, under llama.cpp's names."""
    found = {}
    for name, tensor in merged_tensors(model.language_model).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if config["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
            # llama.cpp rotates neighbouring numbers of a Llama's heads, transformers those half a head apart
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        found[names.get_name(name, (".weight", ".bias"))] = tensor
    return found


def _add_tokenizer(gguf: Any, file: Any, model: MMultiModal, size: int) -> None:
    """Add vocabulary, template, stop tokens and decoding settings; `size` is the number of the embedding's rows."""
    chat, settings = model.processor.chat, model.config.generate
    core = json.loads(model.processor.tokenizer.backend_tokenizer.to_str())
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in core["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for token in core["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre_tokenizer(model))
    file.add_token_list(tokens)
    file.add_token_types(kinds)
    file.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]])
    file.add_add_bos_token(False)
    file.add_eos_token_id(chat.turn_end_id)
    file.add_eot_token_id(chat.answer_end_id)
    file.add_pad_token_id(model.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    file.add_array("tokenizer.ggml.suppress_tokens", model.suppressed_ids)
    file.add_chat_template(llama_cpp_template(model))
    file.add_sampling_temp(settings.temperature)
    file.add_sampling_top_k(settings.top_k)
    file.add_sampling_top_p(settings.top_p)
    file.add_sampling_min_p(settings.min_p)
    file.add_sampling_penalty_repeat(settings.repetition_penalty)
    file.add_sampling_penalty_last_n(-1)  # of the whole dialogue, as ours


def _write_file(gguf: Any, file: Any, path: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Write a file with matrices of the type `kind`; only one of them at a time is converted."""
    kinds, types = {}, gguf.GGMLQuantizationType
    for name, tensor in tensors.items():
        # llama.cpp adds vectors and positions to float32
        wanted = types["F32" if tensor.dim() == 1 or "position_embd" in name else kind.upper()]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]  # quantised numbers, part of a row
        kinds[name] = types.F16 if tensor.shape[-1] % block else wanted
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        file.add_tensor_info(name, tensor.shape, None, math.prod(shape), raw_dtype=kinds[name])
    file.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file.write_header_to_file(path)
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    for name, tensor in tensors.items():
        file.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().numpy(), kinds[name]))
    file.close()


TARGET = ExportTarget(
    check,
    write,
    "llama.cpp",
    packages=("gguf", "xllamacpp"),
    quantised={kind: functools.partial(write, quantised=kind) for kind in ("q8_0", MIXED)},
    quantised_packages={MIXED: ("cyllama",)},
    photos_first=True,
)
