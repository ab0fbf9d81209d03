"""SigLIP's vision tower, its last hidden state as a plain tensor. Loaded by `visual/encoder.py`.

Shapes: B photos, H = W pixels, N = (H // patch)**2 patches, Dv width.
"""

import re

import torch
from transformers import SiglipVisionModel

# parameters of the pooling head, which makes one vector of a photo: published, and of no use here
POOLING_HEAD = (
    "probe",
    *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"{part}.{kind}" for part in ("layernorm", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
)


class SigLIPViT(SiglipVisionModel):
    """SigLIP or SigLIP 2 (fixed resolution) without the pooling head."""

    # what else a published SiglipModel holds, never read; anything more that is left over is an error
    _keys_to_ignore_on_load_unexpected = (
        r"^text_model\.",
        r"^logit_(scale|bias)$",
        r"^(vision_model\.)?embeddings\.position_ids$",
        rf"^(vision_model\.)?head\.({'|'.join(map(re.escape, POOLING_HEAD))})$",
    )

    @property
    def num_tokens(self) -> int:
        """Rows of one photo's output: N, for SigLIP has no class token."""
        return (self.config.image_size // self.config.patch_size) ** 2

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` pixels as `visual.transform` makes them → `(B, N, Dv)`, after the post layer norm.

        Raises:
            ValueError: pictures of another size than the encoder's.
        """
        height, width = pixel_values.shape[-2:]
        if height != self.config.image_size or width != self.config.image_size:
            raise ValueError(f"pictures are {height}×{width}, the encoder takes {self.config.image_size} px squares")
        return super().forward(pixel_values).last_hidden_state
