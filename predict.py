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
import os
from pathlib import Path

from cli import add_model_options, check_model_options, run_script, script_arguments

from config import parse_overrides
from errors import UserError, check_text, file_error, shortened
from paths import check_writable
from visual.photo import load_image, photo_size
from visual.region import Box, Region, parse_box


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

    from answering.answer import Answerer
    from answering.heat_picture import draw_heatmaps
    from answering.heatmap import find_word
    from answering.question_file import answer_file
    from answering.remote import connect
    from model.checkpoint import load_checkpoint

    if args.server is None:
        answerer = Answerer(load_checkpoint(args.checkpoint.absolute(), overrides=overrides))
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
            maps = answerer.look(None, messages, answer, span, args.heatmap_method or "gradient", args.heatmap_layers)
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
        "--heatmap-method", choices=["gradient", "attention"],
        help="what the answer depends on (gradient, the default), or the mean attention; see docs/looking.md",
    )  # fmt: skip
    parser.add_argument(
        "--heatmap-layers", type=_numbers, metavar="0,1,…",
        help="layers of the language model, from 0, whose attention is averaged (default: all)",
    )  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shortened(repr(text))} is no list of numbers such as 0,3,5") from None


def _checked_region(args: argparse.Namespace) -> Box | None:
    """Check `--box` and `--heatmap` before the model is loaded; return the box."""
    for option in ("box", "heatmap"):
        if getattr(args, option) is not None and not args.image:
            raise UserError(f"--{option} belongs to a photo: give --image FILE, and --question TEXT")
    for option in ("word", "method", "layers"):
        if getattr(args, f"heatmap_{option}") is not None and args.heatmap is None:
            raise UserError(f"--heatmap-{option} belongs to --heatmap FILE.png, which says where to draw")
    if args.heatmap_layers is not None and args.heatmap_method != "attention":
        raise UserError("--heatmap-layers belongs to --heatmap-method attention: a gradient passes through all layers")
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


if __name__ == "__main__":
    run_script(main)
