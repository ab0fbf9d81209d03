"""Compare an exported folder with our model's outputs, in a process that has transformers and nothing of ours.

    python -P exporting/stock_check.py FOLDER REFERENCE

`parity.py` writes REFERENCE, starts this file and judges REFERENCE/theirs.json, which it writes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor


def main() -> None:
    folder, reference = Path(sys.argv[1]), Path(sys.argv[2])
    cases = json.loads((reference / "cases.json").read_text(encoding="utf-8"))
    tensors = load_file(reference / "reference.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stock_class = getattr(transformers, config["architectures"][0])
    model, info = stock_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    result = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "tensors": {key: names for key, names in wrong.items() if names},
        "cases": [
            compare(model.eval(), processor, case, reference, own(tensors, number)) for number, case in enumerate(cases)
        ],
    }
    (reference / "theirs.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


def own(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Our tensors of one case: pixels (C, 3, H, W) and features (C, M, Dl) if it has photos, logits (N, V)."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def compare(model: Any, processor: Any, case: dict[str, Any], reference: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """Return the differences of one case; without photos, those of pixels and features are left out."""
    text = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
    photos = [Image.open(reference / name) for name in case["photos"]]
    inputs = processor(text=[text], images=photos or None, return_tensors="pt")
    ids, tokens = torch.tensor([case["ids"]]), torch.tensor([case["tokens"]], dtype=torch.int64)
    result: dict[str, Any] = {"ids_equal": inputs["input_ids"].tolist() == [case["ids"]]}
    pixels = {}
    if photos:
        result["pixels"] = float((inputs["pixel_values"] - ours["pixels"]).abs().max())
        pixels = {"pixel_values": ours["pixels"].to(model.dtype)}
        features = model.get_image_features(**pixels)
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, torch.Tensor) else torch.stack(list(features))
        difference = features.reshape(ours["features"].shape).float() - ours["features"].float()
        result["features"] = float(difference.norm() / ours["features"].float().norm())
    whole = torch.cat([ids, tokens], dim=1)
    logits = model(
        input_ids=whole, attention_mask=torch.ones_like(whole), logits_to_keep=tokens.shape[1] + 1, **pixels
    ).logits[0]
    result["logits"] = float((logits.float() - ours["logits"].float()).abs().max())
    result["logit_std"] = float(ours["logits"].float().std())
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        **pixels,
    )[0, ids.shape[1] :].tolist()
    result["text"] = processor.tokenizer.decode(generated, skip_special_tokens=True)
    result["margin"] = margin(case["tokens"], generated, ours["logits"])
    return result


def margin(ours: list[int], theirs: list[int], logits: torch.Tensor) -> float | None:
    """Return by how much we preferred our token where the answers first differ; None for equal answers."""
    for position, (our_token, their_token) in enumerate(zip(ours, theirs, strict=False)):
        if our_token != their_token:
            return float(logits[position, our_token] - logits[position, their_token])
    return None if len(ours) == len(theirs) else float("inf")


if __name__ == "__main__":
    main()
