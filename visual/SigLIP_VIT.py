"""The image encoder: SigLIP's vision tower, its last hidden state as a plain tensor. Built by `model/model.py`.

Shapes: B photos, H = W pixels, N = (H / patch)**2 patches, Dv width.
"""

from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from config import require_complete


class SigLIPViT(SiglipVisionModel):
    """SigLIP or SigLIP 2 (fixed resolution) without the pooling head."""

    # parts of a published SiglipModel that have no use here and are never read; anything else left over is an error
    _keys_to_ignore_on_load_unexpected = (r"^text_model\.", r"^(vision_model\.)?head\.", r"^logit_(scale|bias)$")

    @property
    def num_patches(self) -> int:
        """N, the number of patches of one photo."""
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


def load_encoder(folder: Path, dtype: torch.dtype) -> SigLIPViT:
    """Load the vision tower from a folder with a whole SigLIP model or the tower alone; all parameters frozen.

    Raises:
        ValueError: not a SigLIP checkpoint, or tensors missing, left over or of the wrong shape.
    """
    config = SiglipVisionConfig.from_pretrained(folder)
    config.vision_use_head = False
    encoder, info = SigLIPViT.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    require_complete(info, "visual.path", folder)
    return encoder.requires_grad_(False).eval()
