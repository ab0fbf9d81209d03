"""What `eval_vqa.py` asks: the questions of a prepared data set or of standard files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from config import Data
from dataset.records import Entry, Photo, read_records, split_entries
from dataset.rows import report_text
from errors import UserError
from evaluation.runner import sample_photos
from evaluation.standard import read_standard
from paths import check_writable, existing_path, resolve_path


class Asked(NamedTuple):
    """Photos and questions.

    Attributes:
        photos: by ID.
        entries: what is asked, at least one.
        train: entries of the training part.
        name: of the split or format.
        note: which rows of standard files were rejected, for the user.
    """

    photos: Mapping[int, Photo]
    entries: Sequence[Entry]
    train: Sequence[Entry]
    name: str
    note: str = ""

    @property
    def has_references(self) -> bool:
        """False for a test set, whose answers are not published."""
        return bool(self.entries[0].turns[0].answers)


def read_files(
    format_name: str, annotations: list[Path], images: Path | None, results: Path | None, limit: int | None, seed: int
) -> Asked:
    """Read the questions of standard files, on about `limit` photos at most, drawn with `seed`.

    Raises:
        UserError: an option is missing or wrong, or as `read_standard`.
    """
    if not annotations or images is None:
        raise UserError(f"--format {format_name} needs --annotations FILE and --images DIR")
    if results is not None:
        check_writable(results, "--results")
        if results.absolute() in [file.absolute() for file in annotations]:
            raise UserError(f"--results: {results} is the file of --annotations: name another")
    photos, entries, report = read_standard(format_name, annotations, images)
    if limit is not None:
        entries = sample_photos(entries, limit, seed)
    asked = Asked(photos, entries, [], format_name, report_text([report]))
    if not asked.has_references and results is None:
        raise UserError(
            f"--annotations: {annotations[0]} has no answers to score against: name the annotations file too, or "
            "--results FILE to get the answers only"
        )
    return asked


def read_questions(data: Data, split: str, limit: int | None) -> Asked:
    """Read the entries of `split` ("val", "train" or "all") on about `limit` photos at most.

    With "all", there is no training part.

    Raises:
        UserError: a file is missing or broken, or no question is left.
    """
    files = {"data.image_map": data.image_map, "data.captions": data.captions}
    if not any(os.path.exists(resolve_path(path)) for path in files.values()):
        # a checkpoint has no absolute paths, so it has only the names of files outside the repository
        raise UserError(
            f"'data.image_map' and 'data.captions' are not found: neither {resolve_path(data.image_map)} nor "
            f"{resolve_path(data.captions)}. A checkpoint keeps no absolute paths: name the files that the training "
            "read with data.image_map=FILE data.captions=FILE"
        )
    photos, entries = read_records(*(existing_path(path, key) for key, path in files.items()))
    train: Sequence[Entry] = []
    if split != "all":
        train, val = split_entries(photos, entries, data.val_fraction)
        entries = val if split == "val" else train
    if not entries:
        raise UserError("nothing to evaluate: the split has no questions. Raise data.val_fraction or pass --split all")
    return Asked(photos, entries if limit is None else sample_photos(entries, limit, data.seed), train, split)
