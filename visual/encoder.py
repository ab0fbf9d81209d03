"""Loads the frozen image encoder, SigLIP or CLIP, from a checkpoint folder. Called by `model/model.py`."""

import json
from pathlib import Path

import torch

from errors import UserError, require_complete
from visual.CLIP_VIT import CLIPViT
from visual.SigLIP_VIT import SigLIPViT

# `model_type` in config.json, of a whole model or of the vision tower alone
ENCODERS = {
    "siglip": SigLIPViT,
    "siglip_vision_model": SigLIPViT,
    "clip": CLIPViT,
    "clip_vision_model": CLIPViT,
}
NAFLEX = ("siglip2", "siglip2_vision_model")  # SigLIP 2 of fixed resolution is of type "siglip"


def load_encoder(folder: Path, dtype: torch.dtype) -> SigLIPViT | CLIPViT:
    """Load the vision tower from a folder with a whole SigLIP or CLIP model or the tower alone; all parameters frozen.

    The text tower and the other parts that have no use here are never read into memory; the classes name them.

    Raises:
        UserError: another kind of model, or tensors missing, left over or of the wrong shape.
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type in NAFLEX:
        raise UserError(
            f"'visual.path': {folder} is a NaFlex SigLIP 2, whose pictures change in size; use one of fixed "
            "resolution, for example google/siglip2-so400m-patch14-384"
        )
    if model_type not in ENCODERS:
        raise UserError(f"'visual.path': {folder} is of type '{model_type}'; supported: {', '.join(ENCODERS)}")
    encoder_class = ENCODERS[model_type]
    config = encoder_class.config_class.from_pretrained(folder)
    if encoder_class is SigLIPViT:
        config.vision_use_head = False
    encoder, info = encoder_class.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,  # so that they are listed with the others
        output_loading_info=True,
    )
    require_complete(info, "visual.path", folder)
    return encoder.requires_grad_(False).eval()
