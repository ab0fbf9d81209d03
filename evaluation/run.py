"""A whole evaluation: questions, passes, scores, files. Called by `eval_vqa.py`, which describes its options."""

import argparse
import platform
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from answering.remote import RemoteAnswerer, connect
from config import parse_overrides
from dataset.records import Photo, json_pieces, write_files
from errors import UserError, file_error, shortened
from evaluation.baselines import NEEDS_WEIGHTS, TRAINED
from evaluation.compare import Comparison, check_same_questions, compare, find_other
from evaluation.passes import Evaluation, answer_questions, describe, evaluate
from evaluation.predictions import Predictions
from evaluation.questions import Asked, read_files, read_questions
from evaluation.report import compared_line, draw_gallery, looks_line, metrics_of, tables
from evaluation.report_html import render_report
from evaluation.runner import Answer, Progress
from evaluation.standard import write_results
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import PROVENANCE_FILE, read_config
from model.model import MMultiModal
from paths import check_folder, check_writable

KEPT = "{} has answers of {}, which are kept: if the server has other weights now, name another --output"


def run(args: argparse.Namespace, command: str) -> Iterator[str]:
    """Evaluate; yield what the user reads of it: first the verdict, then notes on how it came about, then the rest.

    Args:
        args: of `eval_vqa.read_arguments`.
        command: for the report.
    """
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
    _check_options(asked, args)
    notes = [asked.note]  # they wait for the verdict, which is to be the first line
    check_folder(output := args.output or checkpoint / f"eval_{asked.name}", "--output")
    other = None if args.compare is None else find_other(args.compare, asked.name)

    start = time.perf_counter()
    if model is None:
        model = load_checkpoint(checkpoint, overrides=overrides)
    else:
        notes.append(f"no loss and no baseline '{NEEDS_WEIGHTS}': they need the weights, which the server has")
    settings = describe(model, checkpoint, asked.entries, asked.photos, asked.name, args.limit)
    if other is not None:
        notes.append(check_same_questions(settings, other[0]))
    found = None
    with Predictions(output, settings) as predictions:
        notes.append(predictions.note)
        if args.server is not None and predictions.replies:
            notes.append(KEPT.format(predictions.file, settings["checkpoint"]))
        if asked.has_references:
            chosen = (args.baselines, args.hard, progress_bar)
            found = evaluate(model, asked.photos, asked.entries, asked.train, predictions, *chosen)
            answers = found.answers[TRAINED]
        else:
            answers = answer_questions(model, asked.photos, asked.entries, predictions, progress_bar(TRAINED))
    if found is not None:
        yield looks_line(found)
    yield from filter(None, notes)
    if args.results is not None:
        yield write_answers(args.results, answers, asked)
    if found is not None:
        compared = None
        if other is not None:
            compared = compare(str(other[0].get("checkpoint")), found.questions, answers, other[1])
        seconds = round(time.perf_counter() - start, 1)
        facts = {"checkpoint": settings["checkpoint"], "command": command, "settings": settings, "seconds": seconds}
        yield from report(found, compared, asked, facts, output)
    if args.gallery is not None:
        yield write_gallery(args.gallery, answers, asked.photos)


def _check_options(asked: Asked, args: argparse.Namespace) -> None:
    """Raise UserError for an option that needs the right answers, if there are none, or a file it cannot write."""
    options = {"--gallery": args.gallery, "--compare": args.compare, "--hard": args.hard}
    given = [option for option, value in options.items() if value]
    if given and not asked.has_references:
        raise UserError(f"{given[0]} needs the right answers, which these questions lack: leave it out")
    if args.gallery is not None:
        check_writable(args.gallery, "--gallery")
    if args.output is not None and (args.output / PROVENANCE_FILE).exists():  # both have a metrics.json
        raise UserError(f"--output: {shortened(args.output)} is a checkpoint, name a folder in it")


def write_answers(file: Path, answers: list[Answer], asked: Asked) -> str:
    in_order = sorted(answers, key=lambda answer: (answer.entry, answer.turn))
    rows = [(asked.entries[answer.entry].id, answer.question, answer.answer) for answer in in_order]
    write_results(asked.name, file, rows)
    return f"{len(answers)} answers for a leaderboard or scorer: {file}"


def write_gallery(file: Path, answers: list[Answer], photos: Mapping[int, Photo]) -> str:
    try:
        draw_gallery(file, answers, photos)
    except OSError as error:  # the disk is full
        raise file_error(error) from error
    return f"some photos with their answers: {file}"


def progress_bar(name: str) -> Progress:
    return partial(tqdm, desc=name, unit="photo", dynamic_ncols=True)


def report(
    found: Evaluation, compared: Comparison | None, asked: Asked, facts: dict[str, Any], output: Path
) -> Iterator[str]:
    """Write `metrics.json` and `report.html`, both with `facts`; yield the tables."""
    yield tables(found)
    if compared is not None:
        yield compared_line(compared)
    facts |= {
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    metrics = metrics_of(found, compared, **facts)
    page = render_report(found, compared, asked.photos, shown_facts(metrics))
    files = {"metrics.json": json_pieces(metrics), "report.html": [page.encode("utf-8", errors="replace")]}
    write_files({output / name: content for name, content in files.items()})
    yield f"{len(found.questions)} questions in {facts['seconds']} s; {output / 'report.html'}"


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
