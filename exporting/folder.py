"""Write the files of an exported folder: weights, configs, processor, tokenizer. Called by `write.py`.

The names are the hub's own, as transformers 4 wrote them: programs other than transformers 5 read no others.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedModel

from compat import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil
from config import IMAGE_TAG
from exporting.stock import Stock, merged_tensors, plain_config, strategy
from exporting.template import chat_template
from model.model import MMultiModal
from visual.transform import PREPROCESSOR_FILE

SHARD_SIZE = "5GB"  # of a weight file; larger models are split into shards, as on the hub
PROCESSOR_NAMES = {
    SiglipImageProcessorPil: "SiglipImageProcessor",
    CLIPImageProcessorPil: "CLIPImageProcessor",
    ViTImageProcessorPil: "ViTImageProcessor",
    BitImageProcessorPil: "BitImageProcessor",
}
TEXT_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def write_folder(model: MMultiModal, stock: Stock, folder: Path) -> float:
    """Write all but the model card and the report; return the conversion's error. LoRA is merged into the weights."""
    language_model = model.language_model
    tensors = stock.tensors | {
        f"language_model.{name}": tensor for name, tensor in merged_tensors(language_model).items()
    }
    tied = language_model.config.tie_word_embeddings
    if tied:
        tensors.pop("language_model.lm_head.weight", None)
    _write_weights(tensors, folder)
    chat, dtype = model.processor.chat, str(model.encoder.dtype).removeprefix("torch.")
    content = {
        "image_token_index": chat.image_token_id,
        "image_token_id": chat.image_token_id,
        "image_seq_length": chat.plan.crop_tokens,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "torch_dtype": dtype,
        "text_config": text_config(language_model),
    }
    _write(folder, "config.json", stock.config | content)
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner only
        shutil.copymode(folder / "config.json", file)
    _write(folder, "generation_config.json", generation_settings(model))
    _write(folder, PREPROCESSOR_FILE, image_settings(model))
    write_processor(model, folder)
    return stock.feature_error


def text_config(language_model: PreTrainedModel) -> dict[str, Any]:
    """Return the language model's config for its stock class, with the keys of older versions too.

    Qwen v1 becomes a Qwen2 with at most `seq_length` tokens; up to this length both are equal.
    """
    config = plain_config(language_model.config, language_model.get_input_embeddings().weight.dtype)
    if config["model_type"] == "qwen":
        config |= {"model_type": "qwen2", "max_position_embeddings": config["seq_length"]}
        for key in ("seq_length", "use_dynamic_ntk", "use_logn_attn"):
            del config[key]
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | {"architectures": [TEXT_CLASSES[config["model_type"]]]}


def generation_settings(model: MMultiModal) -> dict[str, Any]:
    """Return generation_config.json: the checkpoint's own decoding settings, stop tokens and excluded tokens.

    Greedy is sampling among one token, as Qwen2-VL's folders have it: vLLM reads `top_k` but not `do_sample`, and would
    sample at temperature 1. A temperature of 0 beside `do_sample: false` is refused by transformers 4 on saving.
    """
    settings, stop_ids = model.config.generate, sorted(model.processor.chat.stop_ids)
    content: dict[str, Any] = {
        "eos_token_id": stop_ids,
        "pad_token_id": stop_ids[0],
        "max_new_tokens": settings.max_new_tokens,
        "suppress_tokens": model.suppressed_ids,
        "do_sample": settings.temperature > 0 or settings.num_beams == 1,
    }
    if settings.repetition_penalty != 1:
        content["repetition_penalty"] = settings.repetition_penalty
    if settings.temperature > 0:
        content |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        content |= {"min_p": settings.min_p} if settings.min_p else {}
    elif settings.num_beams > 1:
        content |= {"num_beams": settings.num_beams, "length_penalty": settings.length_penalty}
    else:
        content["top_k"] = 1
    return content


def image_settings(model: MMultiModal) -> dict[str, Any]:
    """Return preprocessor_config.json, with all settings that affect the pixels."""
    processor, (height, width) = model.processor.transform.processor, model.processor.transform.size
    names = [name for kind, name in PROCESSOR_NAMES.items() if isinstance(processor, kind)]
    return {
        "image_processor_type": names[0],
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": processor.do_resize,
        "size": dict(processor.size or {}),
        "resample": int(processor.resample),
        "do_center_crop": bool(processor.do_center_crop),
        "crop_size": {"height": height, "width": width},  # some programs count the image tokens by it
        "do_rescale": processor.do_rescale,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


def write_tokenizer(model: MMultiModal, folder: Path) -> None:
    """Write the tokenizer, and the chat template in all three places where programs look for it."""
    template, tokenizer = chat_template(model), model.processor.tokenizer
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    special = settings.pop("extra_special_tokens", [])
    settings["additional_special_tokens"] = list(special.values()) if isinstance(special, dict) else special
    # transformers 4 fails with a list here; a processor takes the image token from it
    settings["extra_special_tokens"] = {"image_token": IMAGE_TAG}
    if settings["tokenizer_class"] == "TokenizersBackend":  # its name before transformers 5
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        settings.pop(key, None)
    # answers of a batch grow on the right, so its questions are padded on the left
    settings |= {"processor_class": "LlavaProcessor", "chat_template": template, "padding_side": "left"}
    _write(folder, file.name, settings)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write(folder, "chat_template.json", {"chat_template": template})


def write_processor(model: MMultiModal, folder: Path) -> None:
    """Write tokenizer and LLaVA's processor, which repeats the placeholder."""
    write_tokenizer(model, folder)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": model.encoder.patch_size[0],
        "vision_feature_select_strategy": strategy(model),
        "num_additional_image_tokens": model.encoder.leading,
        "image_token": IMAGE_TAG,
    }
    _write(folder, "processor_config.json", processor)


def _write_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the shards and their index, without a copy of the weights.

    huggingface_hub's `save_torch_state_dict` would keep in one shard whatever shares memory: query, key and value of
    Qwen v1 are views of one matrix, and a library may map a whole file into memory and give views of it.
    """
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    for file, names in shards.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write(folder, "model.safetensors.index.json", index)


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    # a tokenizer's model_max_length may be 10^30, which orjson refuses
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
