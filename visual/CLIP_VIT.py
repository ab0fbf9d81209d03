"""CLIP's vision tower, its last hidden state as a plain tensor. Loaded by `visual/encoder.py`.

Shapes: B photos, H = W pixels, N = (H // patch)**2 patches, Dv width.
"""

import torch
from transformers import CLIPVisionModel


class CLIPViT(CLIPVisionModel):
    """CLIP's tower: row 0 of its output is the class token, which `visual.drop_first_token` leaves out.

    The output is what transformers calls `last_hidden_state`: CLIP's post layer norm was trained on the class token
    alone and stands behind it, unlike SigLIP's, which belongs to every patch.
    """

    base_model_prefix = "vision_model"  # of the tower's tensors in a whole CLIPModel
    # what else a published CLIPModel holds, never read; anything more that is left over is an error
    _keys_to_ignore_on_load_unexpected = (
        r"^text_model\.",
        r"^logit_scale$",
        r"^(visual|text)_projection\.weight$",
        r"^(vision_model\.)?embeddings\.position_ids$",
    )

    @property
    def num_tokens(self) -> int:
        """Rows of one photo's output: the class token and N patches."""
        return 1 + (self.config.image_size // self.config.patch_size) ** 2

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` pixels as `visual.transform` makes them → `(B, 1 + N, Dv)`, the class token first.

        Raises:
            ValueError: pictures of another size than the encoder's.
        """
        return super().forward(pixel_values).last_hidden_state
