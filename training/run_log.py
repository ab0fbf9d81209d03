"""The record of a run: `metrics.jsonl`, one JSON object a line, and the same for TensorBoard. Called by `loop.py`.

Each line is about the steps since the line before it, over all processes where nothing else is said:

    step, epoch                    where the run stands; epoch 1.5 is the middle of the second
    loss, grad_norm                mean over the steps; the norm is that before clipping
    projector_lr, lora_lr          learning rates of the last step
    supervised_tokens              labels in a step, mean
    seconds                        of a step, mean; validation and saving do not count
    questions_per_second, tokens_per_second, supervised_tokens_per_second
                                   tokens are those of text and photos, without padding
    mfu                            share of the GPU's measured matrix peak, of the first process (`costs.py`); null on
                                   other devices
    data_wait                      share of the time in which the first process waited for photos and prompts
    peak_memory_gib                of the first process since its start: allocated on the GPU, else resident memory
    val_loss                       on the validation set, where it is due
"""

from pathlib import Path
from typing import Any

import orjson
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`.

    Args:
        resumed_step: lines after this step belong to work that is done again and are cut off.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        kept = []
        if resumed_step and self.file.exists():
            # a line cut short by a crash ends the file, and is of a later step than the last checkpoint
            lines = [line for line in self.file.read_bytes().split(b"\n")[:-1] if line]
            kept = [line for line in lines if orjson.loads(line)["step"] <= resumed_step]
        self.file.write_bytes(b"".join(line + b"\n" for line in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Add one line; numbers go to TensorBoard too."""
        with open(self.file, "ab") as stream:
            stream.write(orjson.dumps({"step": step, **figures}) + b"\n")
        for name, value in figures.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self.board.close()
