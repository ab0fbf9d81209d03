"""CLIP's vision tower with its last hidden state as a plain tensor. Loaded by `visual/encoder.py`."""

from pathlib import Path
from typing import Any, Self

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from visual.tower import ConfigTower, load_pretrained


class CLIPViT(ConfigTower, CLIPVisionModel):
    """CLIP's tower, with a class token in front.

    The output is transformers' `last_hidden_state`, before the post layer norm: CLIP trained that norm on the class
    token only. SigLIP's post layer norm applies to every patch.
    """

    leading = 1
    base_model_prefix = "vision_model"  # of the tower's tensors in a full CLIPModel
    # unused tensors of a published CLIPModel; any other extra tensor is an error
    unread = (
        r"^text_model\.",
        r"^logit_scale$",
        r"^(visual|text)_projection\.weight$",
        r"^(vision_model\.)?embeddings\.position_ids$",
    )

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Self, dict[str, Any]]:
        return load_pretrained(cls, folder, dtype, cls.unread, config=CLIPVisionConfig.from_pretrained(folder))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` → `(C, 1 + N, Dv)`, before the post layer norm."""
        return CLIPVisionModel.forward(self, pixels).last_hidden_state
