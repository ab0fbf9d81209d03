"""Score a checkpoint on its own data, beside what it scores without looking: another photo, no photo, no training.

    python eval_vqa.py --checkpoint checkpoints/demo/checkpoint-240
    python eval_vqa.py --checkpoint DIR --split all --limit 100 --hard blur noise --compare OTHER
    python eval_vqa.py --checkpoint DIR --format vqav2 --annotations QUESTIONS.json ANNOTATIONS.json --images val2014
    python eval_vqa.py --server http://127.0.0.1:8000/v1 --output DIR data.image_map=FILE data.captions=FILE

The data are those of the checkpoint's config, unless `data.image_map=` and `data.captions=` name others, or `--format`
reads standard files; `--results` then writes what leaderboards take. Says first whether the answers depend on the
photo, prints tables, and writes into the folder of --output: `report.html` (a page with scores, curves and examples),
`metrics.json` (all scores) and `predictions.jsonl` (all answers). After an interruption, the same command goes on where
it stopped. --server scores an OpenAI-compatible server, without what needs the weights: loss and baseline `untrained`.
"""

import argparse
import shlex
import sys
from pathlib import Path

from cli import add_model_options, check_model_options, run_script, script_arguments

from errors import UserError, shortened
from evaluation.baselines import BASELINES, NEEDS_WEIGHTS
from evaluation.standard import FORMATS
from visual.augment import DISTORTIONS

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> None:
    args = read_arguments(arguments)
    command = shown_command(sys.argv[1:] if arguments is None else arguments, args.api_key)

    from evaluation.run import run

    for text in run(args, command):
        print(text)


def shown_command(arguments: list[str], key: str | None) -> str:
    """Return the command for the report, which others read, without the API key."""
    return shlex.join(["eval_vqa.py", *(word.replace(key, "KEY") if key else word for word in arguments)])


def read_arguments(arguments: list[str] | None):
    """Read the command line; a name with a `=` after an option with several names is a config value."""
    parser = script_arguments(__doc__, default_config=None)
    add_model_options(parser)
    parser.add_argument(
        "--split", choices=["val", "train", "all"], help="of the run's own questions; default val, the held-out part"
    )
    parser.add_argument(
        "--limit", type=int, metavar="PHOTOS", help="ask about this many photos only, drawn from all sources"
    )
    parser.add_argument(
        "--baselines", nargs="*", metavar="NAME",
        help=f"what to score beside the model: {', '.join(BASELINES)} (default all; without a name, none)",
    )  # fmt: skip
    parser.add_argument(
        "--hard", nargs="*", metavar="KIND",
        help=f"also distort the photos at five strengths: {', '.join(DISTORTIONS)} (without a name, all)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, metavar="DIR", help="another checkpoint that was scored on the same data, or its folder"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the report (default eval_<split> in the checkpoint)"
    )
    parser.add_argument("--format", choices=FORMATS, help="ask the questions of standard files instead")
    parser.add_argument(
        "--annotations", nargs="+", default=[], metavar="FILE",
        help="for --format: one file; vqav2: the questions file, then the annotations file if there is one",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="for --format: folder of the photos")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="for --format: write the result file of this format"
    )
    parser.add_argument("--gallery", type=Path, metavar="FILE.png", help="draw eight photos with their answers")
    args = parser.parse_intermixed_args(arguments)
    check_model_options(args)
    args.overrides += [name for name in args.annotations if "=" in name]
    args.annotations = [Path(name) for name in args.annotations if "=" not in name]
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1 photo, found {args.limit}")
    _check_source(args)
    args.split = args.split or "val"
    for option, known in {"baselines": list(BASELINES), "hard": list(DISTORTIONS)}.items():
        given = getattr(args, option)
        names = [name for name in given or [] if "=" not in name]
        args.overrides += [name for name in given or [] if "=" in name]
        wrong = next((name for name in names if name not in known), None)
        if wrong is not None:
            raise UserError(f"--{option}: unknown name '{shortened(wrong)}': valid are {', '.join(known)}")
        setattr(args, option, names)
        if option == "hard" and given is not None and not names:
            args.hard = known
        if option == "baselines" and given is None:
            args.baselines = [name for name in known if args.server is None or name != NEEDS_WEIGHTS]
    if args.gallery is not None and args.gallery.suffix.lower() not in PICTURES:
        raise UserError(f"--gallery: {args.gallery} must end in one of {', '.join(PICTURES)}")
    if args.server is not None:
        _check_server_options(args.baselines, args.output)
    return args


def _check_source(args: argparse.Namespace) -> None:
    if args.format is None and (args.annotations or args.images or args.results):
        raise UserError("--annotations, --images and --results belong to --format: name it too")
    if args.format is not None and args.split is not None:
        raise UserError("--split is of the run's own questions, and --format asks those of other files: leave one out")


def _check_server_options(baselines: list[str], output: Path | None) -> None:
    if NEEDS_WEIGHTS in baselines:
        raise UserError(f"--baselines {NEEDS_WEIGHTS} needs the weights, which the server has: leave it out")
    if output is None:
        raise UserError("--server needs --output DIR, because there is no checkpoint folder for the report")


if __name__ == "__main__":
    run_script(main)
