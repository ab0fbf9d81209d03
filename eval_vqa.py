"""Score a checkpoint on its own data: accuracy per question type, with the photo and with another one (blind).

    python eval_vqa.py --checkpoint checkpoints/demo/checkpoint-240
    python eval_vqa.py --checkpoint DIR --split all --limit 100 --gallery gallery.png data.captions=data/captions.json

The data are those of the checkpoint's config unless `data.image_map=` and `data.captions=` name others. Says first
whether the answers depend on the photo, prints a table, and writes all scores as JSON with every question and answer.
"""

import functools
import os
from pathlib import Path

from cli import run_script, script_arguments

from tqdm import tqdm

from answering.answer import Answerer
from config import Data, parse_overrides
from dataset.records import Entry, Photo, read_records, split_entries
from errors import UserError, file_error
from evaluation.report import draw_gallery, looks_line, table, write_json
from evaluation.runner import evaluate, sample_photos, visual_gain
from model.checkpoint import load_checkpoint, read_config
from paths import check_writable, existing_path, resolve_path

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="default val, the held-out part"
    )
    parser.add_argument(
        "--limit", type=int, metavar="PHOTOS", help="ask about this many photos only, drawn from all sources"
    )
    parser.add_argument("--no-blind", action="store_true", help="leave out the second pass, with swapped photos")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="where the scores go (default DIR/eval_<split>.json)"
    )
    parser.add_argument("--gallery", type=Path, metavar="FILE.png", help="draw eight photos with their answers")
    args = parser.parse_intermixed_args(arguments)

    checkpoint = args.checkpoint.absolute()
    overrides = parse_overrides(args.overrides)
    # check all files first, because loading and asking the model takes minutes
    data = read_config(checkpoint, overrides).data
    photos, entries = read_questions(data, args.split, args.limit)
    output = args.output or checkpoint / f"eval_{args.split}.json"
    check_writable(output, "--output")
    if args.gallery is not None:
        if args.gallery.suffix.lower() not in PICTURES:
            raise UserError(f"--gallery: {args.gallery} must end in one of {', '.join(PICTURES)}")
        check_writable(args.gallery, "--gallery")

    answerer = Answerer(load_checkpoint(checkpoint, overrides=overrides))
    progress = functools.partial(tqdm, unit="photo", dynamic_ncols=True)
    trained = evaluate(answerer, entries, photos, progress=functools.partial(progress, desc="own photo"))
    blind = None
    if not args.no_blind:
        other = functools.partial(progress, desc="other photo")
        blind = evaluate(answerer, entries, photos, blind=True, progress=other)

    gain = None if blind is None else visual_gain(trained, blind)
    if gain is not None:
        print(looks_line(gain))
    print(table(trained, blind))
    try:
        facts = {"checkpoint": checkpoint.name, "split": args.split, "visual_gain": gain and gain._asdict()}
        write_json(output, trained, blind, **facts)
        print(f"{trained.overall.questions} questions on {trained.photos} photos in {trained.seconds:.1f} s; {output}")
        if args.gallery is not None:
            draw_gallery(args.gallery, trained, photos)
            print(f"some photos with their answers: {args.gallery}")
    except OSError as error:  # the disk is full
        raise file_error(error) from error


def read_questions(data: Data, split: str, limit: int | None) -> tuple[dict[int, Photo], list[Entry]]:
    """Read the photos by ID, and the entries of `split` ("val", "train" or "all") on about `limit` photos at most.

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
    if split != "all":
        entries = split_entries(photos, entries, data.val_fraction)[split == "val"]
    if not entries:
        raise UserError("nothing to evaluate: the split has no questions. Raise data.val_fraction or pass --split all")
    return photos, entries if limit is None else sample_photos(entries, limit, data.seed)


if __name__ == "__main__":
    run_script(main)
