"""Trains projector and LoRA: `python train.py [--config FILE] [--resume auto|DIR] [--dry-run] [key=value …]`.

Reads `data.image_map` and `data.captions` (made by `process_image.py`), writes `train.output_dir/checkpoint-<step>/`,
`metrics.jsonl` and `tensorboard/`. `--dry-run` loads everything, tries the longest sample and prints what will fit and
how long a run will take.
Several GPUs: `torchrun --nproc-per-node 4 train.py …`.
"""

from pathlib import Path

from cli import run_script, script_arguments

from config import load_config


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__)
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from the newest checkpoint of the run, or from DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, token statistics, memory and time; no training"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although data, split, seeds, packing, weights or prompt changed; the provenance records it",
    )
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)

    from training.agreement import lost_processes
    from training.dry_run import describe_run
    from training.loop import Trainer

    resume = args.resume if args.resume in (None, "auto") else str(Path(args.resume).absolute())
    with lost_processes():
        trainer = Trainer(config, resume, args.accept_changes, args.dry_run)
        if args.dry_run:
            print(describe_run(trainer))
            return
        trainer.say(trainer.model.parameter_summary())
        trainer.say(
            f"{len(trainer.train_set.entries):,} questions in {len(trainer.train_set):,} samples, "
            f"{trainer.total_steps:,} steps in {trainer.precision}, {trainer.setting.micro_batch} × "
            f"{trainer.setting.accumulation} samples a step on each process"
        )
        folder = trainer.run()
        # in quotes: a folder's name may hold spaces
        trainer.say(
            f'trained: {folder}\nask it:  python predict.py --checkpoint "{folder}" --image FILE --question TEXT'
        )


if __name__ == "__main__":
    run_script(main)
