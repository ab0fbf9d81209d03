"""The layout of each row of `docs/backbones.md` in miniature, loaded through the product; and the documents' tables."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.backbone_tables import CLIP, LANGUAGE, SIGLIP, language_rows, vision_rows
from model.model import MMultiModal
from paths import REPO_ROOT
from tests.tiny import tiny_config, write_clip, write_qwen, write_siglip


@pytest.mark.parametrize("file", ["docs/backbones.md", "docs/backbones_zh.md"])
def test_tables_hold_what_is_counted(file):
    lines = (REPO_ROOT / file).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| `")] == vision_rows() + language_rows()


@pytest.mark.parametrize(
    ("kind", "image_size", "patch_size"),
    sorted(
        {("siglip", int(name.rpartition("-")[2]), 14 if "patch14" in name else 16) for name in SIGLIP}
        | {("clip", pixels, 14) for pixels in CLIP.values()}
    ),
)
def test_vision_layout_in_miniature(backbones, tmp_path, kind, image_size, patch_size):
    folder = {"siglip": write_siglip, "clip": write_clip}[kind](tmp_path / kind, image_size, patch_size)
    model = MMultiModal.from_config(tiny_config(backbones, visual={"path": str(folder)}))
    grid = image_size // patch_size
    # what `visual.drop: first` leaves out: a patch of SigLIP, the class token of CLIP
    tokens = model.processor.chat.plan.crop_tokens
    assert tokens == grid * grid - (kind == "siglip")
    assert model.encode_image(torch.zeros(1, 3, image_size, image_size)).shape[1] == tokens


@pytest.mark.parametrize(
    ("kind", "tied", "ratio"), sorted({(model.kind, model.tied, model.heads // model.groups) for model in LANGUAGE})
)
def test_language_layout_in_miniature(backbones, tmp_path, kind, tied, ratio):
    """Tied or not, and so many query heads to a key head; Qwen v1's own files are tested on the oracle."""
    settings = {"hidden_size": 8 * ratio, "num_attention_heads": ratio, "num_key_value_heads": 1}
    folder = write_qwen(tmp_path / "qwen", kind, tied, **settings)
    model = MMultiModal.from_config(tiny_config(backbones, llm={"path": str(folder)}))
    weights = [model.LLM.get_input_embeddings().weight, model.LLM.get_output_embeddings().weight]
    assert (weights[0] is weights[1]) == tied
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():  # LoRA starts at zero, so the model still is the one in the folder
        ours = model.eval().LLM(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
