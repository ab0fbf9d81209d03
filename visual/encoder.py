"""Load the image encoder from a checkpoint folder. Called by `model/model.py`."""

import json
from pathlib import Path

import torch

from errors import UserError, require_complete
from visual.CLIP_VIT import CLIPViT
from visual.SigLIP_VIT import SigLIPViT
from visual.timm_tower import TimmViT
from visual.tower import Drop, Feature, Tower, check_drop
from visual.ViT import DINOv2, DINOv2WithRegisters, DINOv3, ViT

# `model_type` in config.json, of a whole model or of the vision tower alone; timm's files have none and count as "timm"
TOWERS: dict[str, type[Tower]] = {
    "siglip": SigLIPViT,
    "siglip_vision_model": SigLIPViT,
    "clip": CLIPViT,
    "clip_vision_model": CLIPViT,
    "vit": ViT,
    "dinov2": DINOv2,
    "dinov2_with_registers": DINOv2WithRegisters,
    "dinov3_vit": DINOv3,
    "timm": TimmViT,
}
STOCK = "llava"  # a whole model as `export.py` writes it
NAFLEX = ("siglip2", "siglip2_vision_model")  # SigLIP 2 of fixed resolution is of type "siglip"


def load_encoder(folder: Path, dtype: torch.dtype, drop: Drop = "first", feature: Feature = "output") -> Tower:
    """Load the vision tower from a folder with a whole model or the tower alone; all parameters frozen, in eval mode.

    The text tower and other unused parts are not loaded; the tower classes list them.

    Args:
        drop, feature: rows that the tower leaves out, and what it returns, see `Tower`.

    Raises:
        UserError: another kind of model, or tensors missing, left over or of the wrong shape.
    """
    check_drop(drop)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    if model_type == STOCK:  # its vision tower
        model_type = config["vision_config"].get("model_type", "clip_vision_model")  # LLaVA's default
    if model_type is None and "architecture" in config and "pretrained_cfg" in config:
        model_type = "timm"
    if model_type in NAFLEX:
        raise UserError(
            f"'visual.path': {folder} is a NaFlex SigLIP 2, whose pictures change in size; use one of fixed "
            "resolution, for example google/siglip2-so400m-patch14-384"
        )
    if model_type not in TOWERS:
        raise UserError(f"'visual.path': {folder} is of type '{model_type}'; supported: {', '.join(TOWERS)}")
    tower, info = TOWERS[model_type].load(folder, dtype)
    require_complete(info, "visual.path", folder)
    tower.drop = drop
    tower.select(feature)
    return tower.requires_grad_(False).eval()
