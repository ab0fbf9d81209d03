"""Output of a run: progress bar, log, trackers, `samples.html`, `loss.png`. Called by `loop.py` and `due.py`.

Every process has a `Watch`; only the one of the first process displays and writes.
"""

from typing import Any

from tqdm import tqdm

from training.build import Run
from training.run_log import RunLog
from training.samples import SampleSheet, describe_sample


class Watch:
    """Progress bar and log files of `run`; its output folder must exist on the first process.

    Raises:
        UserError: the folder is not writable.
    """

    def __init__(self, run: Run) -> None:
        self.main = run.accelerator.is_main_process
        step, config = run.progress.step, run.config
        self.bar = tqdm(total=run.total_steps, initial=step, disable=not self.main, dynamic_ncols=True)
        if not self.main:
            return
        self.log = RunLog(run.output_dir, step, config.train.trackers, config.model_dump())
        train, val, photos = run.train_set.entries, run.val_set.entries, run.train_set.photos
        # with shards, the first process alone has only its share of the weights, so it cannot answer
        self.sheet = None
        if not config.train.shard:
            self.sheet = SampleSheet(run.output_dir, train, val, photos, config.data.seed, step)
        if step == 0:
            run.say(describe_sample(run.train_set, run.epoch_batches(0)[0][0]))

    def step(self, figures: dict[str, Any], line: dict[str, Any]) -> None:
        """Advance the progress bar by one step.

        Args:
            figures: figures of the step.
            line: summary of the steps since the last log line.
        """
        self.bar.update()
        shown = {"loss": f"{figures['loss']:.3f}", "lr": f"{next(iter(figures['rates'].values())):.1e}"}
        self.bar.set_postfix(shown | {"questions_s": f"{line['questions_per_second']:.1f}"})

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Add a line to the log; only on the first process.

        Raises:
            UserError: the line cannot be written.
        """
        self.log.write(step, line)

    def ask(self, run: Run) -> None:
        """Answer the questions of `samples.html`; on the first process, the model is in eval mode afterwards."""
        if self.main and self.sheet is not None:
            with run.accelerator.autocast():  # trained parts are float32, frozen parts may have another dtype
                self.sheet.update(run.model.eval(), run.progress.step)

    def draw(self) -> None:
        """Update `loss.png`."""
        if self.main:
            self.log.draw()

    def close(self) -> None:
        """Close progress bar, log and trackers."""
        self.bar.close()
        if self.main:
            self.log.close()
