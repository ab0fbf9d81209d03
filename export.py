"""Write a checkpoint as one stock transformers model: `python export.py --checkpoint DIR --output DIR [key=value …]`.

LoRA is merged into the weights as they were before any quantisation, and the folder loads with
`VipLlavaForConditionalGeneration.from_pretrained`, without any code of ours. It gets its name only after it was loaded
back and gave the same logits and the same greedy answer.
"""

import os
from pathlib import Path

from cli import run_script, script_arguments

import torch
from safetensors import SafetensorError

from config import parse_overrides
from errors import UserError, file_error, shortened
from exporting.vipllava import export_checkpoint
from model.checkpoint import load_checkpoint
from paths import check_folder


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder of a trained model"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder for the exported model")
    args = parser.parse_intermixed_args(arguments)
    output = args.output.absolute()
    if os.path.lexists(output):  # checked before the model is loaded, which may take minutes
        raise UserError(f"--output: {shortened(output)} exists already, name a new folder")
    check_folder(output, "--output")
    whole = {"llm.quantization": "none", "llm.device_map": None}  # export needs unquantised weights on the CPU
    overrides = parse_overrides(args.overrides) | whole
    model = load_checkpoint(args.checkpoint.absolute(), "cpu", torch.float32, overrides, merge_lora=False)
    try:
        difference = export_checkpoint(model, output)
    except (OSError, SafetensorError) as error:  # no permission, or the disk is full
        reason = error if isinstance(error, OSError) else OSError(None, str(error))
        raise file_error(reason, output) from error
    print(f"{output}: same greedy answer, logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    run_script(main)
