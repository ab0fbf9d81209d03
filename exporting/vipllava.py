"""The target `vipllava`: `VipLlavaForConditionalGeneration`, exact for SigLIP's own output.

Its projector starts with a layer norm, which gets the weights of SigLIP's post layer norm, and it drops the first
patch, as we do. Fewer programs read it than `llava`.
"""

from pathlib import Path

import torch

from errors import UserError
from exporting.folder import write_folder
from exporting.stock import ExportTarget, Stock, check_parts, plain_config, projector_tensors, strategy, vision_tensors
from model.model import MMultiModal
from visual.SigLIP_VIT import SigLIPViT


def check(model: MMultiModal) -> None:
    """Raise UserError for a model that the class cannot hold."""
    check_parts(model)
    if not isinstance(model.encoder, SigLIPViT) or model.encoder.feature != "output":
        kind, feature = type(model.encoder).__name__, model.encoder.feature
        raise UserError(
            f"the encoder is {kind} with 'visual.feature' {feature}, but this class puts a layer norm in front of the "
            "projector, which is SigLIP's last one with visual.feature output: use --format llava"
        )
    if strategy(model) != "default":
        raise UserError(
            f"'visual.drop' is {model.config.visual.drop}, but this class always drops the first patch: use "
            "--format llava"
        )


def convert(model: MMultiModal, pixels: torch.Tensor) -> Stock:
    """Return encoder and projector; `pixels` are not used."""
    tensors = vision_tensors(model) | projector_tensors(model)
    for key, tensor in model.encoder.post_layernorm.state_dict().items():
        # a copy, because the encoder's tensor is saved too and a file cannot have the same tensor twice
        tensors[f"multi_modal_projector.projector_layernorm.{key}"] = tensor.clone()
    config = {
        "architectures": ["VipLlavaForConditionalGeneration"],
        "model_type": "vipllava",
        "projector_hidden_act": "gelu",
        "projector_layernorm_eps": model.encoder.config.layer_norm_eps,
        "vision_feature_layers": -1,
        "vision_config": plain_config(model.encoder.config, model.encoder.dtype),
    }
    return Stock(config, tensors)


def write(model: MMultiModal, pixels: torch.Tensor, folder: Path) -> float:
    """Write the folder; see `ExportTarget`."""
    return write_folder(model, convert(model, pixels), folder)


TARGET = ExportTarget(check, write)
