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

import platform
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from cli import add_model_options, check_model_options, run_script, script_arguments

import torch
import transformers
from tqdm import tqdm

from answering.remote import RemoteAnswerer, connect
from config import parse_overrides
from dataset.records import Photo, json_pieces, write_files
from errors import UserError, file_error, shortened
from evaluation.compare import Comparison, check_same_questions, compare, find_other
from evaluation.passes import (
    BASELINES,
    NEEDS_WEIGHTS,
    TRAINED,
    Evaluation,
    answer_questions,
    describe,
    evaluate,
)
from evaluation.predictions import Predictions
from evaluation.questions import Asked, read_files, read_questions
from evaluation.report import compared_line, draw_gallery, looks_line, metrics_of, tables
from evaluation.report_html import render_report
from evaluation.runner import Answer, Progress
from evaluation.standard import FORMATS, write_results
from model.checkpoint import load_checkpoint, read_config
from model.model import MMultiModal
from paths import check_folder, check_writable
from visual.augment import DISTORTIONS

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> None:
    args = read_arguments(arguments)
    checkpoint = Path(args.checkpoint or "").absolute()
    overrides = parse_overrides(args.overrides)
    # check all files first, because loading and asking the model takes minutes
    model: MMultiModal | RemoteAnswerer | None = None
    if args.server is not None:
        model, config = connect(args, overrides, "data")
        data = config.data
    else:
        data = read_config(checkpoint, overrides).data
    asked = (
        read_questions(data, args.split, args.limit)
        if args.format is None
        else read_files(args.format, args.annotations, args.images, args.results, args.limit, data.seed)
    )
    if asked.note:
        print(asked.note)
    output = args.output or checkpoint / f"eval_{asked.name}"
    check_folder(output, "--output")
    if args.gallery is not None:
        check_writable(args.gallery, "--gallery")
    other = None if args.compare is None else find_other(args.compare, asked.name)

    start = time.perf_counter()
    if model is None:
        model = load_checkpoint(checkpoint, overrides=overrides)
    else:
        print(f"no loss and no baseline '{NEEDS_WEIGHTS}': they need the weights, which the server has")
    settings = describe(model, checkpoint, asked.entries, asked.photos, asked.name, args.limit)
    if other is not None:
        check_same_questions(settings, other[0])
    with Predictions(output, settings) as predictions:
        if predictions.note:
            print(predictions.note)
        found = None
        if asked.has_references:
            found = evaluate(
                model, asked.photos, asked.entries, asked.train, predictions, args.baselines, args.hard, progress_bar
            )
            answers = found.answers[TRAINED]
        else:
            bar = progress_bar(TRAINED)
            answers = answer_questions(model, asked.photos, asked.entries, predictions, bar)
    if args.results is not None:
        write_leaderboard(asked, answers, args.results)
    if found is not None:
        compared = None
        if other is not None:
            compared = compare(str(other[0].get("checkpoint")), found.questions, answers, other[1])
        run = {
            "checkpoint": settings["checkpoint"],
            "command": shown_command(sys.argv[1:] if arguments is None else arguments, args.api_key),
            "settings": settings,
            "seconds": round(time.perf_counter() - start, 1),
        }
        report(found, compared, asked.photos, run, output)
    if args.gallery is not None:
        write_gallery(args.gallery, answers, asked.photos)


def write_leaderboard(asked: Asked, answers: list[Answer], file: Path) -> None:
    in_order = sorted(answers, key=lambda answer: (answer.entry, answer.turn))
    rows = [(asked.entries[answer.entry].id, answer.question, answer.answer) for answer in in_order]
    write_results(asked.name, file, rows)
    print(f"{len(answers)} answers for a leaderboard or scorer: {file}")


def write_gallery(file: Path, answers: list[Answer], photos: dict[int, Photo]) -> None:
    try:
        draw_gallery(file, answers, photos)
    except OSError as error:  # the disk is full
        raise file_error(error) from error
    print(f"some photos with their answers: {file}")


def shown_command(arguments: list[str], key: str | None) -> str:
    """Return the command for the report, which others read, without the API key."""
    return shlex.join(["eval_vqa.py", *(word.replace(key, "KEY") if key else word for word in arguments)])


def progress_bar(name: str) -> Progress:
    return partial(tqdm, desc=name, unit="photo", dynamic_ncols=True)


def report(
    found: Evaluation, compared: Comparison | None, photos: dict[int, Photo], run: dict[str, Any], output: Path
) -> None:
    """Print what was found, and write `metrics.json` and `report.html`; `run` are facts for both."""
    print(looks_line(found.gain))
    print(tables(found))
    if compared is not None:
        print(compared_line(compared))
    run |= {
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    metrics = metrics_of(found, compared, **run)
    page = render_report(found, compared, photos, shown_facts(metrics))
    files = {"metrics.json": json_pieces(metrics), "report.html": [page.encode("utf-8", errors="replace")]}
    write_files({output / name: content for name, content in files.items()})
    print(f"{len(found.questions)} questions in {run['seconds']} s; {output / 'report.html'}")


def read_arguments(arguments: list[str] | None):
    """Read the command line; a name with a `=` after an option with several names is a config value."""
    parser = script_arguments(__doc__, default_config=None)
    add_model_options(parser)
    parser.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="default val, the held-out part"
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
    if args.format is None and (args.annotations or args.images or args.results):
        raise UserError("--annotations, --images and --results belong to --format: name it too")
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


def _check_server_options(baselines: list[str], output: Path | None) -> None:
    if NEEDS_WEIGHTS in baselines:
        raise UserError(f"--baselines {NEEDS_WEIGHTS} needs the weights, which the server has: leave it out")
    if output is None:
        raise UserError("--server needs --output DIR, because there is no checkpoint folder for the report")


def shown_facts(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the page tells of the run."""
    settings, versions = metrics["settings"], metrics["versions"]
    decoding = ", ".join(f"{key} {value}" for key, value in settings["generate"].items())
    return {
        "checkpoint": metrics["checkpoint"],
        "command": metrics["command"],
        "split": settings["split"],
        "photos": metrics["photos"],
        "questions": metrics["questions"],
        "decoding": decoding or "the server's own",
        "computed": settings["computed"],
        "finished": f"{metrics['finished']}, after {metrics['seconds']} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


if __name__ == "__main__":
    run_script(main)
