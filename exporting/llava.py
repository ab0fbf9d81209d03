"""The target `llava`: `LlavaForConditionalGeneration`, which most programs for such models read.

LLaVA takes the states of an encoder layer. A model trained on these (`visual.feature` last or penultimate, or CLIP) is
written as it is. SigLIP's own output is behind one more layer norm, which LLaVA does not have. It is then written as
one more encoder layer (`fold`), which every program computes with the layers that it has.
"""

from pathlib import Path

import torch

from errors import UserError
from exporting.folder import write_folder
from exporting.stock import ExportTarget, Stock, check_parts, plain_config, projector_tensors, strategy, vision_tensors
from model.model import MMultiModal
from visual.SigLIP_VIT import SigLIPViT

# Largest relative error that the folded layer norm may add. It is in the order of float16's own rounding.
LARGEST_ERROR = 5e-4
# Exponents of the scale that are tried. Below 7 the error is too large for any model; above 12, c · LN(x) approaches
# the largest float16, and int8 programs round the weights of the other layers away.
EXPONENTS = range(7, 13)
LAYER = "vision_tower.vision_model.encoder.layers"


def check(model: MMultiModal) -> None:
    """Raise UserError for a model that the class cannot hold."""
    check_parts(model)
    if _folds(model) and model.encoder.config.intermediate_size < 2 * model.encoder.width:
        raise UserError(
            "SigLIP's last layer norm is written as an encoder layer, which needs an intermediate size of twice the "
            f"width, and this encoder has {model.encoder.config.intermediate_size} for {model.encoder.width}: use "
            "--format vipllava, or train with visual.feature=last"
        )


@torch.no_grad()
def convert(model: MMultiModal, pixels: torch.Tensor) -> Stock:
    """Return encoder and projector; a folded encoder's weights are changed.

    Raises:
        UserError: the folded layer norm would be too inexact.
    """
    folds = _folds(model)
    exponent, error = _scale(model, pixels) if folds else (0, 0.0)
    tensors = vision_tensors(model) | projector_tensors(model)
    vision = plain_config(model.encoder.config, model.encoder.dtype)
    if folds:
        _fold(tensors, vision, exponent)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy(model),
        "vision_config": vision,
    }
    return Stock(config, tensors, error)


def _folds(model: MMultiModal) -> bool:
    return isinstance(model.encoder, SigLIPViT) and model.encoder.feature == "output"


def _scale(model: MMultiModal, pixels: torch.Tensor) -> tuple[int, float]:
    """Return the exponent of the scale, and the error that it leaves on `pixels`: the smallest that is small enough."""
    encoder, errors = model.encoder, {}
    states = encoder.encoder(inputs_embeds=encoder.embeddings(pixels.to(encoder.dtype))).last_hidden_state
    ratio = float(states.float().norm() / encoder.post_layernorm(states).float().norm())
    for exponent in EXPONENTS:
        errors[exponent] = ratio * 4.0**-exponent
        if errors[exponent] <= LARGEST_ERROR:
            return exponent, errors[exponent]
    raise UserError(
        "SigLIP's last layer norm, written as an encoder layer, would change the features by "
        f"{min(errors.values()):.1e} (at most {LARGEST_ERROR:.0e}): use --format vipllava"
    )


def _fold(tensors: dict[str, torch.Tensor], vision: dict, exponent: int) -> None:
    """Add a layer x → x + c · LN(x) behind the encoder's layers, with c = 2^`exponent`, and shrink x by 1 / c.

    Its attention gives 0, its MLP has fc1 = [I; −I] and fc2 = c · [I, −I], and gelu(z) − gelu(−z) = z in every variant
    of GELU. All that is added to x is scaled by 1 / c, and the layer norms' eps by 1 / c², so that they give the same.
    The projector divides by c and gets LN(x) + x / c², with the original x. Scaling by a power of two is exact in
    float32 and bfloat16; in float16, numbers that become smaller than 6e-5 lose bits, and the comparison measures that.
    """
    scale, prefix = 2.0**exponent, "vision_tower.vision_model."
    count, width, inner = vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"]
    parts = ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    added = [f"{prefix}embeddings.{part}" for part in parts]
    added += [
        f"{LAYER}.{number}.{part}.{kind}"
        for number in range(count)
        for part in ("self_attn.out_proj", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    for name in added:
        tensors[name] /= scale
    new = {name: torch.zeros_like(tensors[name]) for name in tensors if name.startswith(f"{LAYER}.{count - 1}.")}
    new = {name.replace(f"{LAYER}.{count - 1}.", ""): tensor for name, tensor in new.items()}
    identity = torch.eye(width, dtype=new["mlp.fc1.weight"].dtype)
    assert inner >= 2 * width, "checked by `check`"
    new["mlp.fc1.weight"][: 2 * width] = torch.cat([identity, -identity])
    new["mlp.fc2.weight"][:, : 2 * width] = scale * torch.cat([identity, -identity], dim=1)
    for kind in ("weight", "bias"):
        new[f"layer_norm2.{kind}"] = tensors[f"{prefix}post_layernorm.{kind}"].clone()
    tensors |= {f"{LAYER}.{count}.{name}": tensor for name, tensor in new.items()}
    tensors["multi_modal_projector.linear_1.weight"] /= scale
    vision |= {"num_hidden_layers": count + 1, "layer_norm_eps": vision["layer_norm_eps"] / scale**2}


def write(model: MMultiModal, pixels: torch.Tensor, folder: Path) -> float:
    """Write the folder; see `ExportTarget`."""
    return write_folder(model, convert(model, pixels), folder)


TARGET = ExportTarget(check, write)
