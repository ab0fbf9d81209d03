"""Export a model: write the folder, compare it, put it in its place. Called by `export.py`.

Two steps, because the second loads the folder in another process, and the first model must be out of memory by then.
"""

import itertools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from errors import UserError
from exporting.card import write_card
from exporting.parity import Reference, compare, store_reference
from exporting.targets import TARGETS
from model.model import MMultiModal

REPORT_FILE = "export_report.json"


@dataclass
class Written:
    """A written folder that was not compared yet.

    Attributes:
        folder: under a temporary name.
        output: its final name.
        target: format, a key of `TARGETS`.
        weights: a key of its `quantised`, or empty.
        reference: our outputs.
        feature_error: that the conversion makes.
        card: what the model card says, without the comparison.
    """

    folder: Path
    output: Path
    target: str
    weights: str
    reference: Reference
    feature_error: float
    card: dict[str, Any]


def write_export(model: MMultiModal, output: Path, target: str, card: dict[str, Any], weights: str = "") -> Written:
    """Write `model` (on the CPU, in the dtype of the export) beside `output`; its weights are changed.

    Args:
        weights: a key of the target's `quantised`, or empty.

    Raises:
        UserError: the format cannot hold this model.
    """
    TARGETS[target].check(model)
    folder, outputs = (output.with_name(f"{output.name}.{kind}") for kind in ("tmp", "outputs.tmp"))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(outputs, ignore_errors=True)
    folder.mkdir(parents=True)
    outputs.mkdir()
    try:
        reference = store_reference(model, outputs, TARGETS[target].photos_first)
        write = TARGETS[target].quantised.get(weights, TARGETS[target].write)
        feature_error = write(model, reference.pixels, folder)
    except BaseException:  # a partial folder is of no use and may have filled the disk
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(outputs, ignore_errors=True)
        raise
    return Written(folder, output, target, weights, reference, feature_error, card)


def check_export(written: Written) -> dict[str, Any]:
    """Compare the folder in a fresh process, write its report and model card, and give it its final name.

    Returns:
        The report.

    Raises:
        UserError: it differs by more than allowed. It is kept under the name `<output>.failed-<number>`.
        OSError: the disk is full. Nothing is kept.
    """
    start = time.monotonic()
    report: dict[str, Any] = {"format": written.target, "passed": False}
    program = TARGETS[written.target].program
    try:
        report |= compare(written.reference, written.folder, program, written.feature_error, weights=written.weights)
        report |= {"passed": not report["problems"], "seconds": round(time.monotonic() - start, 1)}
        (written.folder / REPORT_FILE).write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
        write_card(written.folder, written.card, report)
    except BaseException:  # a folder that was not compared is no export, and may have filled the disk
        shutil.rmtree(written.folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(written.reference.folder, ignore_errors=True)
    if report["passed"]:
        os.replace(written.folder, written.output)
        return report
    names = (written.output.with_name(f"{written.output.name}.failed-{number}") for number in itertools.count(1))
    failed = next(name for name in names if not os.path.lexists(name))
    os.replace(written.folder, failed)
    raise UserError(
        f"the exported model is not the same ({'; '.join(report['problems'][:3])}): do not use {failed}, its "
        f"{REPORT_FILE} has all figures"
    )
