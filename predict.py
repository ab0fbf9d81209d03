"""Answers a question about a photo, or a file of questions, with a checkpoint.

    python predict.py --checkpoint DIR --image photo.jpg --question "What is in this picture?"
    python predict.py --checkpoint DIR --question "你好" generate.max_new_tokens=50
    python predict.py --checkpoint DIR --input questions.jsonl --output answers.jsonl

A row of the input is {"image": FILE, "question": TEXT, …}; relative photo paths count from the folder of that file,
"image" may be missing. The output has the same rows with "answer" added, or "error" where there is no answer. The exit
status is 1 if any row failed. It is fastest if questions on the same photo follow one another. Out of memory and Ctrl-C
end the work at once; the rows answered so far are in the output.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from cli import run_script, script_arguments

from tqdm import tqdm

from answering.answer import Answerer
from config import parse_overrides
from errors import UserError, check_text, file_error, is_out_of_memory, shortened
from model.checkpoint import load_checkpoint
from paths import check_writable


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--image", type=Path, metavar="FILE", help="photo; without one, a question without a photo")
    parser.add_argument("--question", metavar="TEXT", help="the question; its answer is printed as it grows")
    parser.add_argument("--input", type=Path, metavar="FILE.jsonl", help="questions, one row a line")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="the rows with their answers")
    args = parser.parse_intermixed_args(arguments)
    if (args.question is None) == (args.input is None):
        raise UserError("give either --question TEXT (with --image FILE) or --input FILE.jsonl --output FILE.jsonl")
    if args.question is not None and args.output is not None:
        raise UserError("--output belongs to --input; the answer to --question is printed")
    if args.input is not None:
        _check_files(args.input, args.output, args.image)
    elif args.image is not None and not os.path.isfile(args.image):
        raise UserError(f"--image: photo not found: {shortened(args.image)}")
    if args.question is not None:
        check_text(args.question, "--question")

    overrides = parse_overrides(args.overrides)
    answerer = Answerer(load_checkpoint(args.checkpoint.absolute(), overrides=overrides))
    if args.question is not None:
        for piece in answerer.stream(args.image, [{"role": "user", "content": args.question}]):
            print(piece, end="", flush=True)
        print()
    elif args.input is not None:
        answered, failed = answer_file(answerer, args.input, args.output)
        print(f"{answered} rows answered, {failed} with an error: {args.output}")
        if failed:
            raise UserError(f'{failed} of {answered + failed} rows could not be answered, see "error" in {args.output}')


def _check_files(source: Path, target: Path | None, image: Path | None) -> None:
    if target is None or image is not None:
        raise UserError("--input needs --output FILE.jsonl and no --image: the rows name their photos")
    if not os.path.isfile(source):
        raise UserError(f"input file not found: {shortened(source)}")
    try:
        source.open("rb").close()
    except OSError as error:
        raise file_error(error, source) from error
    check_writable(target, "--output")
    if os.path.exists(target) and os.path.samefile(source, target):  # by another name or through a link
        raise UserError(f"--output would overwrite the input {source}: give another name")


def answer_file(answerer: Answerer, source: Path, target: Path) -> tuple[int, int]:
    """Answer the rows of `source` in order, writing each line as soon as it is done.

    Returns:
        The number of rows answered and of rows with an error.
    """
    counts = {"answer": 0, "error": 0}
    lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # Windows editors put a mark in front
    try:
        # half a surrogate pair is legal in JSON but not in UTF-8: it becomes "?"
        with target.open("w", encoding="utf-8", errors="replace") as output:
            for number, line in enumerate(tqdm(lines, desc="rows", unit="row", dynamic_ncols=True), start=1):
                if not line.strip():
                    continue
                row = _answered(answerer, number, line, source.parent)
                counts["error" if "error" in row else "answer"] += 1
                print(json.dumps(row, ensure_ascii=False), file=output, flush=True)
    except OSError as error:  # of the output alone, since those of a row stay in `_answered`: the disk is full
        raise file_error(error, target) from error
    return counts["answer"], counts["error"]


def _answered(answerer: Answerer, number: int, line: bytes, folder: Path) -> dict[str, Any]:
    """The row with its answer or with the reason why there is none, which never ends the file."""
    row: dict[str, Any] = {"line": number}
    try:
        row = _parse(line)
        row["answer"] = _answer_row(answerer, row, folder)
    except UserError as error:
        row["error"] = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        row["error"] = f"{type(error).__name__}: {shortened(error)}"  # a defect; the type tells it from a bad row
    return row


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number, parse_float=_finite)
        json.dumps(row, ensure_ascii=False)  # what can be read but not written, such as brackets nested too deeply
    except RecursionError as error:
        raise UserError("brackets are nested too deeply") from error
    except ValueError as error:
        raise UserError(f"not valid JSON in UTF-8: {shortened(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f'expected {{"image": …, "question": …}}, found {type(row).__name__}')
    return {key: value for key, value in row.items() if key not in ("answer", "error")}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shortened(text, 40))


def _answer_row(answerer: Answerer, row: dict[str, Any], folder: Path) -> str:
    image, question = row.get("image"), row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f'"question" must be a text, found {shortened(repr(question))}')
    if image is not None and not (isinstance(image, str) and image):
        raise UserError(f'"image" must be a file name, found {shortened(repr(image))}')
    check_text(question, '"question"')
    if image is not None and not os.path.isfile(folder / image):  # takes names of any kind and length
        raise UserError(f"photo not found: {shortened(folder / image)}")
    return answerer.answer(None if image is None else folder / image, question)


if __name__ == "__main__":
    run_script(main)
