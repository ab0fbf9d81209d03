"""Make a trained demo checkpoint the one that the repository has, with its scores.

    python -m demo.make_data --photos 8000
    python process_image.py --config configs/demo.yaml
    torchrun --nproc-per-node 2 train.py --config configs/demo.yaml train.accumulation=1 train.max_steps=2000 \\
        train.eval_steps=200
    python eval_vqa.py --checkpoint checkpoints/demo/checkpoint-2000
    python -c "import pathlib, tasks; tasks.ask_paraphrases(pathlib.Path('checkpoints/demo/checkpoint-2000'))"
    python -m demo.ship checkpoints/demo/checkpoint-2000

These are the commands of `demo/checkpoint`. The last one copies the folder there, without the state for going on, and
writes the scores of both evaluations to `demo/backbones/scores.json`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from demo.pretrain import BACKBONES
from errors import UserError

SHIPPED = Path(__file__).parent / "checkpoint"
NO_PHOTO = "unknown"  # type of the questions that are rightly answered without looking


def ship(checkpoint: Path, shipped: Path = SHIPPED, scores: Path = BACKBONES / "scores.json") -> None:
    """Copy `checkpoint` over `shipped`, and its scores into the record `checkpoint` of the file `scores`.

    Raises:
        FileNotFoundError: one of the two evaluations is missing; nothing was changed.
        UserError: `checkpoint` is `shipped` itself.
    """
    if checkpoint.resolve() == shipped.resolve():
        raise UserError(f"{checkpoint} is what is shipped already: name the checkpoint of a run")
    photos, wordings = (
        json.loads((checkpoint / folder / "metrics.json").read_text(encoding="utf-8"))["passes"]
        for folder in ("eval_val", "eval_paraphrases")
    )
    records = json.loads(scores.read_text(encoding="utf-8"))
    records["checkpoint"] = {
        "command": "see demo/ship.py",
        "scores": {
            "held-out photos": _shares(photos["trained"]),
            "held-out photos, with another photo": _shares(photos["blind"]),
            "held-out wordings": _shares(wordings["trained"]),
        },
    }
    new = shipped.with_name(f"{shipped.name}.tmp")  # a full disk then leaves the old one
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(checkpoint, new, ignore=shutil.ignore_patterns("trainer_state", "eval_*"))
    shutil.rmtree(shipped, ignore_errors=True)
    new.rename(shipped)
    scores.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shares(scored: dict[str, Any]) -> dict[str, float]:
    """Share of right answers by type, of all that need a photo, and of all."""
    by_type = scored["by_type"]
    looked = [own for kind, own in by_type.items() if not kind.startswith(NO_PHOTO)]
    right = sum(own["accuracy"] * own["questions"] for own in looked) / sum(own["questions"] for own in looked)
    shares = {kind: own["accuracy"] for kind, own in by_type.items()}
    shares |= {f"all but {NO_PHOTO}": right, "all": scored["overall"]["accuracy"]}
    return {name: round(share, 4) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    ship(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
