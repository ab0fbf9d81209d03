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
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)

    from training.estimate import describe_run
    from training.loop import Trainer

    resume = args.resume if args.resume in (None, "auto") else str(Path(args.resume).absolute())
    trainer = Trainer(config, resume)
    if args.dry_run:
        print(describe_run(trainer))
        return
    if trainer.accelerator.is_main_process:
        print(trainer.model.parameter_summary())
        print(
            f"{len(trainer.train_set.entries):,} questions in {len(trainer.train_set):,} samples, "
            f"{trainer.total_steps:,} steps in {trainer.precision}, {trainer.setting.micro_batch} × "
            f"{trainer.setting.accumulation} samples a step on each process"
        )
    folder = trainer.run()
    if trainer.accelerator.is_main_process:
        print(f"trained: {folder}\nask it:  python predict.py --checkpoint {folder} --image FILE --question TEXT")


if __name__ == "__main__":
    run_script(main)
