"""Score a checkpoint on its own data, beside what it scores without looking: another photo, no photo, no training.

    python eval_vqa.py --checkpoint checkpoints/demo/checkpoint-240
    python eval_vqa.py --checkpoint DIR --split all --limit 100 --hard blur noise --compare OTHER

The data are those of the checkpoint's config unless `data.image_map=` and `data.captions=` name others. Says first
whether the answers depend on the photo, prints tables, and writes into the folder of --output: `report.html` (a page
with scores, curves and examples), `metrics.json` (all scores) and `predictions.jsonl` (all answers). After an
interruption, the same command goes on where it stopped.
"""

import os
import platform
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from cli import run_script, script_arguments

import torch
import transformers
from tqdm import tqdm

from config import Data, parse_overrides
from dataset.records import Entry, Photo, json_pieces, read_records, split_entries, write_files
from errors import UserError, file_error, shortened
from evaluation.compare import check_same_questions, compare, find_other
from evaluation.passes import BASELINES, TRAINED, describe, evaluate
from evaluation.predictions import Predictions
from evaluation.report import compared_line, draw_gallery, looks_line, metrics_of, tables
from evaluation.report_html import render_report
from evaluation.runner import sample_photos
from model.checkpoint import load_checkpoint, read_config
from paths import check_folder, check_writable, existing_path, resolve_path
from visual.augment import DISTORTIONS

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> None:
    args = read_arguments(arguments)
    checkpoint = args.checkpoint.absolute()
    overrides = parse_overrides(args.overrides)
    # check all files first, because loading and asking the model takes minutes
    photos, entries, train = read_questions(read_config(checkpoint, overrides).data, args.split, args.limit)
    output = args.output or checkpoint / f"eval_{args.split}"
    check_folder(output, "--output")
    if args.gallery is not None:
        if args.gallery.suffix.lower() not in PICTURES:
            raise UserError(f"--gallery: {args.gallery} must end in one of {', '.join(PICTURES)}")
        check_writable(args.gallery, "--gallery")
    other = None if args.compare is None else find_other(args.compare, args.split)

    start = time.perf_counter()
    model = load_checkpoint(checkpoint, overrides=overrides)
    settings = describe(model, checkpoint, entries, photos, args.split, args.limit)
    if other is not None:
        check_same_questions(settings, other[0])
    with Predictions(output, settings) as predictions:
        if predictions.note:
            print(predictions.note)
        found = evaluate(
            model, photos, entries, train, predictions, args.baselines, args.hard,
            progress=lambda name: partial(tqdm, desc=name, unit="photo", dynamic_ncols=True),
        )  # fmt: skip
    compared = None
    if other is not None:
        compared = compare(str(other[0].get("checkpoint")), found.questions, found.answers[TRAINED], other[1])

    print(looks_line(found.gain))
    print(tables(found))
    if compared is not None:
        print(compared_line(compared))
    run = {
        "checkpoint": checkpoint.name,
        "command": shlex.join(["eval_vqa.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "settings": settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    metrics = metrics_of(found, compared, **run)
    page = render_report(found, compared, photos, shown_facts(metrics))
    files = {"metrics.json": json_pieces(metrics), "report.html": [page.encode("utf-8", errors="replace")]}
    write_files({output / name: content for name, content in files.items()})
    print(f"{len(found.questions)} questions in {run['seconds']} s; {output / 'report.html'}")
    if args.gallery is not None:
        try:
            draw_gallery(args.gallery, found.answers[TRAINED], photos)
        except OSError as error:  # the disk is full
            raise file_error(error) from error
        print(f"some photos with their answers: {args.gallery}")


def read_arguments(arguments: list[str] | None):
    """Read the command line; a name after `--baselines` or `--hard` that has a `=` is a config value."""
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="default val, the held-out part"
    )
    parser.add_argument(
        "--limit", type=int, metavar="PHOTOS", help="ask about this many photos only, drawn from all sources"
    )
    parser.add_argument(
        "--baselines", nargs="*", default=list(BASELINES), metavar="NAME",
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
    parser.add_argument("--gallery", type=Path, metavar="FILE.png", help="draw eight photos with their answers")
    args = parser.parse_intermixed_args(arguments)
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
    return args


def read_questions(data: Data, split: str, limit: int | None) -> tuple[dict[int, Photo], list[Entry], list[Entry]]:
    """Read the photos by ID, the entries of `split` ("val", "train" or "all") on about `limit` photos at most, and
    those of the training part; with "all", there is none.

    Raises:
        UserError: a file is missing or broken, `limit` is below 1, or no question is left.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1 photo, found {limit}")
    files = {"data.image_map": data.image_map, "data.captions": data.captions}
    if not any(os.path.exists(resolve_path(path)) for path in files.values()):
        # a checkpoint has no absolute paths, so it has only the names of files outside the repository
        raise UserError(
            f"'data.image_map' and 'data.captions' are not found: neither {resolve_path(data.image_map)} nor "
            f"{resolve_path(data.captions)}. A checkpoint keeps no absolute paths: name the files that the training "
            "read with data.image_map=FILE data.captions=FILE"
        )
    photos, entries = read_records(*(existing_path(path, key) for key, path in files.items()))
    train: list[Entry] = []
    if split != "all":
        train, val = split_entries(photos, entries, data.val_fraction)
        entries = val if split == "val" else train
    if not entries:
        raise UserError("nothing to evaluate: the split has no questions. Raise data.val_fraction or pass --split all")
    return photos, entries if limit is None else sample_photos(entries, limit, data.seed), train


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
        "decoding": decoding,
        "computed": settings["computed"],
        "finished": f"{metrics['finished']}, after {metrics['seconds']} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


if __name__ == "__main__":
    run_script(main)
