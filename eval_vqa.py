"""Scores a checkpoint on its own data: accuracy per question type, with the photo and with another one (blind).

    python eval_vqa.py --checkpoint checkpoints/demo/checkpoint-500
    python eval_vqa.py --checkpoint DIR --split all --limit 100 --gallery gallery.png data.captions=data/captions.json

The data are those of the checkpoint's config unless `data.image_map=`, `data.captions=` name others.
"""

import functools
from pathlib import Path

from cli import run_script, script_arguments

from tqdm import tqdm

from config import parse_overrides
from dataset.records import read_records, split_entries
from evaluation.report import draw_gallery, table, write_json
from evaluation.runner import evaluate
from model.answer import Answerer
from model.model import MMultiModal
from paths import existing_path


def main(arguments: list[str] | None = None) -> None:
    parser = script_arguments(__doc__, default_config=None)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder")
    parser.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="default val, the held-out part"
    )
    parser.add_argument("--limit", type=int, metavar="PHOTOS", help="stop after the questions of this many photos")
    parser.add_argument("--no-blind", action="store_true", help="leave out the pass with swapped photos")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default DIR/eval_<split>.json")
    parser.add_argument("--gallery", type=Path, metavar="FILE.png", help="draw eight photos with their answers")
    args = parser.parse_intermixed_args(arguments)

    checkpoint = args.checkpoint.absolute()
    overrides = parse_overrides(args.overrides)
    model = MMultiModal.from_checkpoint(checkpoint, overrides=overrides)
    data = model.config.data
    photos, entries = read_records(
        existing_path(data.image_map, "data.image_map"), existing_path(data.captions, "data.captions")
    )
    if args.split != "all":
        entries = split_entries(photos, entries, data.val_fraction)[args.split == "val"]
    if args.limit is not None:
        kept = sorted({ID for entry in entries for ID in entry.images})[: max(args.limit, 0)]
        entries = [entry for entry in entries if set(entry.images) <= set(kept)]

    answerer = Answerer(model)
    trained = evaluate(
        answerer, entries, photos, progress=functools.partial(tqdm, desc="own photo", unit="photo", dynamic_ncols=True)
    )
    blind = None
    if not args.no_blind:
        progress = functools.partial(tqdm, desc="other photo", unit="photo", dynamic_ncols=True)
        blind = evaluate(answerer, entries, photos, blind=True, progress=progress)

    print(table(trained, blind))
    output = args.output or checkpoint / f"eval_{args.split}.json"
    write_json(output, trained, blind, checkpoint=checkpoint.name, split=args.split)
    print(f"{trained.overall.questions} questions on {trained.photos} photos in {trained.seconds:.1f} s; {output}")
    if args.gallery is not None:
        draw_gallery(args.gallery, trained, photos)
        print(f"some photos with their answers: {args.gallery}")


if __name__ == "__main__":
    run_script(main)
