"""Answer a question about photos, or a file of questions, with a checkpoint.

    python predict.py --checkpoint DIR --image photo.jpg --question "What is in this picture?"
    python predict.py --checkpoint DIR --image before.jpg --image after.jpg --question "What has changed?"
    python predict.py --checkpoint DIR --question "你好" generate.max_new_tokens=50
    python predict.py --checkpoint DIR --image photo.jpg --box 40,60,180,200 --question "What is this?"
    python predict.py --checkpoint DIR --image photo.jpg --question "What is it?" --heatmap looked.png
    python predict.py --checkpoint DIR --input questions.jsonl --output answers.jsonl
    python predict.py --server http://127.0.0.1:8000/v1 --image photo.jpg --question "What is in this picture?"

A row of the input is {"image": FILE, "question": TEXT, …}; relative photo paths count from the folder of that file.
"image" may be missing, or a list of files. Rows of the training format "jsonl" are taken as they are:

    {"turns": [{"image": "1.jpg", "question": "What is it?", "answer": "A cat."},
               {"image": ["2.jpg", "3.jpg"], "question": "And these?"}]}

A row or turn may have a "box", [x0, y0, x1, y1]: its question is then about this part of the last photo before it.
The last question is answered, after the dialogue before it; an answer that the row has for it is not looked at. Photos
come before the question of their turn, or at its tags <image>. LLaVA's "conversations" may stand in place of "turns".

The output has the same rows with "answer" added, or "error" where there is no answer. The exit status is 1 if any row
failed. Rows are answered in batches, which is fastest if questions on the same photo follow one another. Out of memory,
a server that is gone and Ctrl-C end the work at once; the rows of the batches before are in the output.

--server asks an OpenAI-compatible server (serve.py is one) instead of a checkpoint; key=value then sets generate.*
only.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

from cli import add_model_options, check_model_options, run_script, script_arguments

from tqdm import tqdm

from answering.answer import Answerer
from answering.connection import ServerGoneError
from answering.heat_picture import draw_heatmaps
from answering.heatmap import Method, find_word
from answering.remote import connect
from answering.request import AnyAnswerer, PhotoSource, Reply, Request, add_region
from config import IMAGE_TAG, parse_overrides
from dataset.rows import DropRowError
from dataset.turns import IMAGE_WORD, Turns, box_of, place_photos
from errors import UserError, check_text, file_error, is_out_of_memory, shortened
from model.checkpoint import load_checkpoint
from paths import check_writable
from visual.photo import load_image, photo_size
from visual.region import Box, Region, parse_box

ROWS_AT_ONCE = 1024  # rows in memory; a batch is far smaller


def main(arguments: list[str] | None = None) -> None:
    args = _parsed(arguments)
    check_model_options(args)
    if (args.question is None) == (args.input is None):
        raise UserError("give either --question TEXT (with --image FILE) or --input FILE.jsonl --output FILE.jsonl")
    if args.question is not None and args.output is not None:
        raise UserError("--output belongs to --input; the answer to --question is printed")
    if args.input is not None:
        _check_files(args.input, args.output, args.image)
    for image in args.image:
        if not os.path.isfile(image):
            raise UserError(f"--image: photo not found: {shortened(image)}")
    if args.question is not None:
        check_text(args.question, "--question")
    box = _checked_region(args)

    overrides = parse_overrides(args.overrides)
    if args.server is None:
        answerer: AnyAnswerer = Answerer(load_checkpoint(args.checkpoint.absolute(), overrides=overrides))
    else:
        answerer, _ = connect(args, overrides)
    if args.question is not None:
        messages = [{"role": "user", "content": args.question, "images": args.image, "box": box}]
        stream = answerer.stream(None, messages)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        if args.heatmap is not None and isinstance(answerer, Answerer):
            answer = stream.rest().text
            span = None if args.heatmap_word is None else find_word(answer, args.heatmap_word)
            maps = answerer.look(None, messages, answer, span, args.heatmap_method)
            photos = [load_image(photo) for photo in answerer.request(None, messages).photos]
            draw_heatmaps(maps, photos).save(args.heatmap, format="PNG")
    elif args.input is not None:
        answered, failed = answer_file(answerer, args.input, args.output)
        print(f"{answered} rows answered, {failed} with an error: {args.output}")
        if failed:
            raise UserError(f'{failed} of {answered + failed} rows could not be answered, see "error" in {args.output}')


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = script_arguments(__doc__, default_config=None)
    add_model_options(parser)
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE",
        help="photo of the question; may be given several times, or not at all",
    )  # fmt: skip
    parser.add_argument(
        "--box", metavar="X0,Y0,X1,Y1",
        help="ask about this part of the last photo: left, top, right and bottom edge in pixels, or as fractions of "
             "width and height with a point (0.25,0.0,0.5,1.0)",
    )  # fmt: skip
    parser.add_argument("--question", metavar="TEXT", help="the question; its answer is printed as it grows")
    parser.add_argument("--input", type=Path, metavar="FILE.jsonl", help="questions, one row a line")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="the rows with their answers")
    parser.add_argument("--heatmap", type=Path, metavar="FILE.png", help="draw where the model looked")
    parser.add_argument("--heatmap-word", metavar="WORD", help="looked for this part of the answer, its first place")
    parser.add_argument(
        "--heatmap-method", choices=get_args(Method), default="gradient",
        help="what the answer depends on (gradient, the default), or the mean attention; see docs/looking.md",
    )  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def _checked_region(args: argparse.Namespace) -> Box | None:
    """Check `--box` and `--heatmap` before the model is loaded; return the box."""
    for option in ("box", "heatmap"):
        if getattr(args, option) is not None and not args.image:
            raise UserError(f"--{option} belongs to a photo: give --image FILE, and --question TEXT")
    if args.heatmap_word is not None and args.heatmap is None:
        raise UserError("--heatmap-word belongs to --heatmap FILE.png, which says where to draw")
    if args.heatmap is not None:
        if args.server is not None:
            raise UserError("--heatmap needs the weights: give --checkpoint DIR in place of --server")
        check_writable(args.heatmap, "--heatmap")
        if any(os.path.exists(args.heatmap) and os.path.samefile(args.heatmap, image) for image in args.image):
            raise UserError(f"--heatmap would overwrite the photo {args.heatmap}: give another name")
    if args.box is None:
        return None
    box = parse_box(args.box)
    photo_size(Region(args.image[-1], box))  # an error if it is not inside
    return box


def _check_files(source: Path, target: Path | None, images: list[Path]) -> None:
    if target is None or images:
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


def answer_file(answerer: AnyAnswerer, source: Path, target: Path) -> tuple[int, int]:
    """Answer the rows of `source` in order, writing the lines of a batch as soon as it is answered.

    Returns:
        The number of rows answered and of rows with an error.
    """
    counts = {"answer": 0, "error": 0}
    lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # Windows editors add a byte order mark
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        # half a surrogate pair is legal in JSON but not in UTF-8: it becomes "?"
        with (
            target.open("w", encoding="utf-8", errors="replace") as output,
            tqdm(total=len(numbered), desc="rows", unit="row", dynamic_ncols=True) as progress,
        ):
            for start in range(0, len(numbered), ROWS_AT_ONCE):
                for row in _answered(answerer, numbered[start : start + ROWS_AT_ONCE], source.parent):
                    counts["error" if "error" in row else "answer"] += 1
                    print(json.dumps(row, ensure_ascii=False), file=output, flush=True)
                    progress.update()
    except OSError as error:  # the output file failed (disk full); `_answered` handles the errors of a row
        raise file_error(error, target) from error
    return counts["answer"], counts["error"]


def _answered(answerer: AnyAnswerer, lines: list[tuple[int, bytes]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each row with its answer or its error; a failed row does not end the file."""
    rows: list[tuple[dict[str, Any], Request | Exception]] = []
    for number, line in lines:
        row: dict[str, Any] = {"line": number}
        try:
            row = _parse(line)
            rows.append((row, _request(answerer, row, folder)))
        except Exception as error:
            _raise_hopeless(error)
            rows.append((row, error))
    replies = _replies(answerer, [request for _, request in rows if isinstance(request, Request)])
    for row, request in rows:
        reply = next(replies) if isinstance(request, Request) else request
        if isinstance(reply, Reply):
            yield row | {"answer": reply.text}
        elif isinstance(reply, UserError):
            yield row | {"error": str(reply)}
        else:  # a defect; a bad row has no error type
            yield row | {"error": f"{type(reply).__name__}: {shortened(reply)}"}


def _replies(answerer: AnyAnswerer, requests: list[Request]) -> Iterator[Reply | Exception]:
    """Answer the requests together; after a defect, answer the rest one by one, so that only the defect's row fails."""
    done = 0
    try:
        for reply in answerer.answer_many(requests):
            yield reply
            done += 1
    except Exception as error:
        _raise_hopeless(error)
        for request in requests[done:]:
            try:
                yield answerer.stream_messages(*request).rest()
            except Exception as own:
                _raise_hopeless(own)
                yield own


def _raise_hopeless(error: Exception) -> None:
    """Raise what every other row would meet too."""
    if is_out_of_memory(error) or isinstance(error, ServerGoneError):
        raise error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number, parse_float=_finite)
        json.dumps(row, ensure_ascii=False)  # some rows can be read but not written, as with deeply nested brackets
    except RecursionError as error:
        raise UserError("brackets are nested too deeply") from error
    except ValueError as error:
        raise UserError(f"not valid JSON in UTF-8: {shortened(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f'expected {{"image": …, "question": …}}, found {type(row).__name__}')
    return {key: value for key, value in row.items() if key not in ("answer", "error")}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shortened(text, 40))


def _request(answerer: AnyAnswerer, row: dict[str, Any], folder: Path) -> Request:
    """Return the last question of `row`, with the dialogue before it.

    Raises:
        UserError: the row has a wrong form, or a photo is missing.
    """
    turns = _turns(row)
    for photo in (folder / name for turn in turns for name in turn.get("images", ())):
        if not os.path.isfile(photo):  # accepts names of any kind and length
            raise UserError(f"photo not found: {shortened(photo)}")
    chat, messages = answerer.chat, []
    photos: list[PhotoSource] = []
    for turn in turns:
        before = len(photos)
        photos += [folder / name for name in turn.get("images", ())]
        if "box" in turn:
            add_region(photos, turn["box"])
        messages.append(chat.question(turn["q"], len(photos) - before))
        if turn is not turns[-1]:
            messages.append(chat.answer(turn["a"]))
    return Request(photos, messages)


def _turns(row: dict[str, Any]) -> Turns:
    """Return the turns of a row, with photos at tags in the questions as in training; the last turn has no answer."""
    names = _photo_names(row)
    items, where = [row], ""
    if "conversations" in row:
        items, where = _pairs(row["conversations"]), "a human turn: "
    elif "turns" in row:
        items, where = row["turns"], "a turn: "
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UserError(f'"turns" must be a list of objects, found {shortened(repr(items))}')
    turns = []
    for number, item in enumerate(items, start=1):
        turns.append({"q": _text(item, "question", where)})
        if number < len(items):
            turns[-1]["a"] = _text(item, "answer", where)
    own = [_photo_names(item) if item is not row else [] for item in items]
    try:
        for turn, item in zip(turns, items, strict=True):
            turn |= box_of(item)
        turns[0] = box_of(row) | turns[0]
        if not any(own):
            return place_photos(turns, names, {})
        if names and own[0]:
            raise UserError("the row and its first turn both name photos: name them in one place")
        own[0] = own[0] or names
        return [
            place_photos([turn], photos, {}, seen=any(own[:number]))[0]
            for number, (turn, photos) in enumerate(zip(turns, own, strict=True))
        ]
    except DropRowError as problem:
        raise UserError(f"{problem.reason}: {problem.detail}") from problem


def _pairs(messages: Any) -> list[dict[str, Any]]:
    """Convert LLaVA's alternating `human` and `gpt` messages to questions and answers."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f'"conversations" must be a list of messages, found {shortened(repr(messages))}')
    speakers = [message.get("from") for message in messages]
    if not messages or speakers != (["human", "gpt"] * len(messages))[: len(messages)]:
        raise UserError(f'"conversations": human and gpt must take turns, found {shortened(repr(speakers))}')
    answers = [{"answer": message.get("value")} for message in messages[1::2]] + [{}]
    return [{"question": human.get("value")} | answer for human, answer in zip(messages[::2], answers, strict=False)]


def _text(item: dict[str, Any], name: str, where: str) -> str:
    """Return the question or answer of a turn, also under its first letter; the first of several answers."""
    value = item.get(name, item.get(name[0]))
    if name == "answer" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}"{name}" must be a text, found {shortened(repr(value))}')
    check_text(value, f'"{name}"')
    if name == "question" and IMAGE_WORD in value and IMAGE_TAG in value:
        raise UserError(f'"question" has {IMAGE_TAG} beside {IMAGE_WORD}: take it out')
    return value


def _photo_names(item: dict[str, Any]) -> list[str]:
    """Return the photo files of a row or turn: `image` or `images`, else `image_id`."""
    values = [item[field] for field in ("image", "images") if item.get(field) not in (None, [])]
    if not values and item.get("image_id") is not None:
        values = [item["image_id"]]
    named = [value if isinstance(value, list) else [value] for value in values]
    for name in (name for names in named for name in names):
        if not isinstance(name, str) or not name:
            raise UserError(f'"image" must be a file name or a list of them, found {shortened(repr(name))}')
    if named[1:] and named[0] != named[1]:
        raise UserError(f'"image" and "images" name different photos: {shortened(repr(named))}')
    return named[0] if named else []


if __name__ == "__main__":
    run_script(main)
