"""Train what `train.parts` names: projector, language model, encoder.

    python train.py --config my.yaml --dry-run        # try the longest sample; print memory and time by setting
    python train.py --config my.yaml train.max_steps=100
    python train.py --config my.yaml --resume auto    # continue after an interruption
    torchrun --nproc-per-node 4 train.py              # several GPUs

Reads `data.image_map` and `data.captions`, which `process_image.py` makes. Writes to `train.output_dir`:
`checkpoint-<step>/`, `metrics.jsonl`, `samples.html`, `loss.png`, `backbones.json` and the trackers' files; with
`train.stages`, each stage but the last writes these into a folder of its own there, such as `1-align/`.

Ctrl-C, SIGTERM and a closed terminal end the run after its current step, with a checkpoint and exit status 128 + the
number of the signal; a second signal ends it at once.
"""

import os
from pathlib import Path

from cli import run_script, script_arguments

from config import load_config
from errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__)
    parser.add_argument("--resume", metavar="auto|DIR", help="continue from the run's newest checkpoint, or from DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, tokens, memory and time; train and write nothing"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: continue although data, split, seeds, packing, sample length, answers, weights, tiles or "
        "prompt changed; the checkpoints record it",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.accept_changes and args.resume is None:
        raise UserError("--accept-changes belongs to --resume auto or --resume DIR: a new run continues nothing")
    config = load_config(args.config, args.overrides)

    from training.agreement import lost_processes
    from training.stages import describe, stages

    resume = args.resume if args.resume in (None, "auto") else str(Path(args.resume).absolute())
    with lost_processes():
        if args.dry_run:
            for text in describe(config):
                if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
                    print(text)
        else:
            for trainer in stages(config, resume, args.accept_changes):
                trainer.run()
                del trainer  # the next stage needs its memory


if __name__ == "__main__":
    run_script(main)
