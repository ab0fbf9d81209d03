"""SigLIP's vision tower with its last hidden state as a plain tensor. Loaded by `visual/encoder.py`."""

import re
from pathlib import Path
from typing import Any, Self

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from visual.tower import ConfigTower, load_pretrained

# parameters of the published pooling head (one vector per photo), unused here
POOLING_HEAD = (
    "probe",
    *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"{part}.{kind}" for part in ("layernorm", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
)


class SigLIPViT(ConfigTower, SiglipVisionModel):
    """SigLIP or SigLIP 2 (fixed resolution) without the pooling head; it has no class token."""

    leading = 0
    # unused tensors of a published SiglipModel; any other extra tensor is an error
    unread = (
        r"^text_model\.",
        r"^logit_(scale|bias)$",
        r"^(vision_model\.)?embeddings\.position_ids$",
        rf"^(vision_model\.)?head\.({'|'.join(map(re.escape, POOLING_HEAD))})$",
    )

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Self, dict[str, Any]]:
        config = SiglipVisionConfig.from_pretrained(folder)
        config.vision_use_head = False
        return load_pretrained(cls, folder, dtype, cls.unread, config=config)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` → `(C, N, Dv)`, after the post layer norm; before it unless `feature` is `output`."""
        if self.feature == "output":
            return SiglipVisionModel.forward(self, pixels).last_hidden_state
        return self.encoder(inputs_embeds=self.embeddings(pixels)).last_hidden_state
