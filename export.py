"""Write a checkpoint for other programs: `python export.py --checkpoint DIR --output DIR [--format …] [key=value …]`.

LoRA is merged into the weights as they were before any quantisation, and the folder needs no code of ours. It is loaded
by the program that reads it, in a process of its own, and must give the same features, logits and answers. Its
export_report.json has the figures; docs/carrying.md says what can be exported and who reads it.
"""

import gc
import importlib.util
import json
import os
from pathlib import Path

from cli import run_script, script_arguments

import torch
from safetensors import SafetensorError

from backbones.backbone import locate_backbone
from config import Config, parse_overrides
from errors import UserError, file_error, shortened
from exporting.card import BEAMS, card_facts, has_beams
from exporting.targets import TARGETS
from exporting.write import check_export, write_export
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import read_config
from paths import check_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Export needs unquantised weights on the CPU. A learning rate of 0 keeps trained parts in the dtype of the others.
OVERRIDES = {
    "llm.quantization": "none",
    "llm.device_map": None,
    "train.parts.projector.lr": 0.0,
    "train.parts.llm.lr": 0.0,
    "train.parts.vision.lr": 0.0,
}


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder of a trained model"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder for the exported model")
    parser.add_argument(
        "--format", choices=list(TARGETS), default=next(iter(TARGETS)),
        help="llava (the default, a stock class that most programs read), vipllava (exact for SigLIP's own output), "
        "onnx or openvino (graphs), gguf (for llama.cpp)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto",
        help="of the weights and the comparison; auto (the default): that of the language model's own folder, for "
        "graphs float32 in place of bfloat16",
    )  # fmt: skip
    quantised = {name: key for key, target in TARGETS.items() for name in target.quantised}
    kinds = ", ".join(f"{name} with --format {key}" for name, key in quantised.items())
    parser.add_argument("--weights", choices=list(quantised), help=f"smaller ones, in place of --dtype's: {kinds}")
    args = parser.parse_intermixed_args(arguments)
    target = TARGETS[args.format]
    if args.weights and args.weights not in target.quantised:
        raise UserError(f"--weights {args.weights}: only --format {quantised[args.weights]} has such weights")
    needed = target.packages + target.quantised_packages.get(args.weights, ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        option = f"--format {args.format}" + (f" --weights {args.weights}" if args.weights else "")
        raise UserError(f"{option} needs {', '.join(missing)}: pip install -r requirements-export.txt")
    output = args.output.absolute()
    if os.path.lexists(output):  # checked before the model is loaded, which may take minutes
        raise UserError(f"--output: {shortened(output)} exists already, name a new folder")
    check_folder(output, "--output")
    checkpoint, overrides = args.checkpoint.absolute(), parse_overrides(args.overrides)
    config = read_config(checkpoint, overrides)
    dtype = _own_dtype(config, checkpoint) if args.dtype == "auto" else DTYPES[args.dtype]
    if args.dtype == "auto" and dtype == torch.bfloat16 and not target.bfloat16:
        dtype = torch.float32
    try:
        model = load_checkpoint(checkpoint, device="cpu", dtype=dtype, overrides=overrides | OVERRIDES)
        card = card_facts(model, checkpoint, config)
        written = write_export(model, output, args.format, card, args.weights or "")
        del model  # the comparison loads the folder in another process
        gc.collect()
        report = check_export(written)
    except (OSError, SafetensorError) as error:  # no permission, or the disk is full
        # numpy tells of a full disk by the number of bytes that it has written
        other = OSError(None, f"not everything could be written ({error}), is the disk full?")
        reason = error if isinstance(error, OSError) and error.strerror else other
        raise file_error(reason, output) from error
    questions = report["questions"]
    same = sum(question["same"] for question in questions)
    print(
        f"{output}: {same} of {len(questions)} greedy answers are the same, logits differ by at most "
        f"{max(question['logits'] for question in questions):.1e} ({report['weights']})"
    )
    if args.format == "llava" and has_beams(output):
        print(f"{output}: {BEAMS}")


def _own_dtype(config: Config, checkpoint: Path) -> torch.dtype:
    """The dtype in the language model's config.json; float32 without one."""
    folder = locate_backbone(config.llm.path, config.model_root, "llm.path", config.hub, checkpoint.parent)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DTYPES.get(settings.get("dtype", settings.get("torch_dtype")), torch.float32)


if __name__ == "__main__":
    run_script(main)
