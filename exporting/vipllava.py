"""Write a model as one stock transformers folder that needs no code of ours. Called by `export.py`.

The class is `VipLlavaForConditionalGeneration`. Its projector starts with a layer norm, which gets the weights of
SigLIP's post layer norm, and it drops the first patch, as we do. The folder is loaded back and compared before it gets
its final name.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from transformers import PreTrainedModel, VipLlavaForConditionalGeneration

from config import IMAGE_TAG
from errors import UserError, require_complete
from model.model import MMultiModal
from visual.SigLIP_VIT import SigLIPViT

# both sides use float32 and the same merged weights; only the order of sums differs
TOLERANCE = 1e-4
SHARD_SIZE = "5GB"  # of a weight file; larger models are split into shards, as on the hub


def export_checkpoint(model: MMultiModal, output: Path) -> float:
    """Write `model` (float32, on the CPU) to the folder `output`; its LoRA is merged into its weights.

    Returns:
        Largest logit difference between `model` and the exported model.

    Raises:
        UserError: `output` exists, the encoder is not SigLIP, the model keeps all patches, or the exported model
            answers differently.
    """
    if output.exists():
        raise UserError(f"{output} exists already: name a new folder with --output")
    if not isinstance(model.encoder, SigLIPViT):
        raise UserError(
            "'visual.path' is not a SigLIP encoder: the stock class written here takes SigLIP's last layer norm into "
            "its projector, so only models with a SigLIP encoder can be exported"
        )
    if model.config.visual.drop != "first" or model.config.visual.tiles:
        raise UserError(
            f"'visual.drop' is {model.config.visual.drop} and 'visual.tiles' {model.config.visual.tiles}, but the "
            "stock class always drops the first patch and has no tiles: only models with first and 0 can be exported"
        )
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    pixels, input_ids = trial_input(model)
    with torch.no_grad():
        our_logits = model(pixels, input_ids).logits
    our_tokens = model.generate(pixels, input_ids, max_new_tokens=20, do_sample=False)
    if isinstance(model.LLM, PeftModel):
        model.LLM = model.LLM.merge_and_unload()
    write_folder(model, temporary)
    their_logits, their_tokens = exported_outputs(temporary, pixels, input_ids, model.suppressed_ids)
    if not torch.equal(our_tokens, their_tokens):
        raise UserError(f"exported greedy tokens {their_tokens.tolist()}, ours {our_tokens.tolist()}: see {temporary}")
    difference = float((our_logits - their_logits).abs().max())
    if difference > TOLERANCE:
        raise UserError(
            f"the exported model's logits differ by {difference:.1e} (allowed {TOLERANCE}): see {temporary}"
        )
    os.replace(temporary, output)
    return difference


def write_folder(model: MMultiModal, folder: Path) -> None:
    """Write weights under the hub's names, config, processor and tokenizer."""
    tensors = {f"vision_tower.vision_model.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in model.LLM.state_dict().items()}
    if model.LLM.config.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    projector = "multi_modal_projector."
    tensors |= {f"{projector}{name}": tensor for name, tensor in model.feature_proj.llava_tensors().items()}
    for key, tensor in model.encoder.post_layernorm.state_dict().items():
        # a copy, because the encoder's tensor is saved too and a file cannot have the same tensor twice
        tensors[f"{projector}projector_layernorm.{key}"] = tensor.clone()
    # Qwen v1's query, key and value are views of one fused matrix, and a file cannot store views
    whole = {
        name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(whole, folder, max_shard_size=SHARD_SIZE)

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))

    stop_ids = sorted(model.processor.chat.stop_ids)
    text = text_config(model.LLM)
    write(
        "config.json",
        {
            "architectures": ["VipLlavaForConditionalGeneration"],
            "model_type": "vipllava",
            "image_token_index": model.processor.chat.image_token_id,
            "image_token_id": model.processor.chat.image_token_id,
            "projector_hidden_act": "gelu",
            "projector_layernorm_eps": model.encoder.config.layer_norm_eps,
            "vision_feature_layers": -1,
            "image_seq_length": model.processor.chat.plan.crop_tokens,
            "tie_word_embeddings": model.LLM.config.tie_word_embeddings,
            "dtype": "float32",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": model.encoder.config.to_dict(),
        },
    )
    write("generation_config.json", {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0], "do_sample": False})
    shutil.copy(model.visual_folder / "preprocessor_config.json", folder)
    model.processor.tokenizer.chat_template = chat_template(model)
    model.processor.tokenizer.save_pretrained(folder)
    write(
        "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": model.encoder.config.patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 0,
            "image_token": IMAGE_TAG,
        },
    )


def text_config(language_model: PreTrainedModel) -> dict[str, Any]:
    """Return the language model's config for its stock class.

    Qwen v1 becomes a Qwen2 with at most `seq_length` tokens; up to this length both are equal.
    """
    config = language_model.config.to_dict()
    if config["model_type"] == "qwen":
        config |= {"model_type": "qwen2", "max_position_embeddings": config["seq_length"]}
        for key in ("seq_length", "use_dynamic_ntk", "use_logn_attn"):
            del config[key]
    classes = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    return config | {"architectures": [classes[config["model_type"]]]}


def chat_template(model: MMultiModal) -> str:
    """Return a Jinja template with the same output as `qwen/chat.py`: the photo, a newline, the question."""
    prompt = model.config.prompt
    system_block = prompt.system or model.processor.chat.first_generation
    system = f"<|im_start|>system\n{prompt.system}<|im_end|>\n" if system_block else ""
    think = model.processor.chat.think
    before, after = ("", prompt.question_prefix) if prompt.image_first else (prompt.question_prefix, "")
    return (
        f"{{{{- {system!r} }}}}"
        "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' }}"
        "{%- if message.content is string %}"
        f"{{{{- {prompt.question_prefix!r} + message.content }}}}"
        "{%- else %}{%- set photos = message.content | selectattr('type', 'equalto', 'image') | list %}"
        f"{{{{- {before!r} + {IMAGE_TAG!r} * photos | length }}}}"
        "{%- if photos %}{{- '\\n' }}{%- endif %}"
        f"{{{{- {after!r} }}}}"
        "{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}"
        "{%- elif message.role == 'assistant' %}"
        f"{{{{- {'<|im_start|>assistant' + chr(10) + think!r} }}}}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}{%- endif %}"
        f"{{{{- {prompt.end_token + chr(10)!r} }}}}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}"
        f"{{{{- {'<|im_start|>assistant' + chr(10) + think!r} }}}}"
        "{%- endif %}"
    )


def trial_input(model: MMultiModal) -> tuple[torch.Tensor, torch.Tensor]:
    """A random picture (1, 3, H, W) and a question about it (1, T)."""
    pixels = torch.rand(1, 3, *model.encoder.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids, _ = model.processor.chat.render([model.processor.chat.typed_question("What is in the picture?", 1)])
    return pixels, torch.tensor([ids])


@torch.no_grad()
def exported_outputs(folder: Path, pixels: torch.Tensor, input_ids: torch.Tensor, suppressed_ids: list[int]):
    """Logits (1, T, V) and greedy tokens (1, new) of the folder, loaded with transformers alone.

    Raises:
        UserError: tensors missing or left over.
    """
    exported, info = VipLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    require_complete(info, "--output", folder)
    tokens = exported.generate(
        pixel_values=pixels,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        suppress_tokens=suppressed_ids,
        max_new_tokens=20,
        do_sample=False,
    )
    return exported(pixel_values=pixels, input_ids=input_ids).logits, tokens[:, input_ids.shape[1] :]
