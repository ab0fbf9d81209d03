"""What people see of a run: progress bar, log, trackers, `samples.html`, `loss.png`. Called by `loop.py`.

Every process makes a `Watch`; only the first one's shows and writes anything.
"""

from typing import Any

from tqdm import tqdm

from training.build import Run
from training.run_log import RunLog
from training.samples import SampleSheet, describe_sample


class Watch:
    """Follows the steps of `run`, whose output folder exists on the first process.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, run: Run) -> None:
        self.main = run.accelerator.is_main_process
        step, config = run.progress.step, run.config
        self.bar = tqdm(total=run.total_steps, initial=step, disable=not self.main, dynamic_ncols=True)
        if not self.main:
            return
        self.log = RunLog(run.output_dir, step, config.train.trackers, config.model_dump())
        train = [] if len(run.val_set) else list(run.train_set.entries)
        val, photos = list(run.val_set.entries), run.train_set.photos
        self.sheet = SampleSheet(run.output_dir, train, val, photos, config.data.seed, step)
        if step == 0:
            run.say(describe_sample(run.train_set, run.epoch_batches(0)[0][0]))

    def step(self, figures: dict[str, Any], line: dict[str, Any]) -> None:
        """Move the bar by the step of `figures`; `line` sums up the steps since the log's last line."""
        self.bar.update()
        shown = {"loss": f"{figures['loss']:.3f}", "lr": f"{next(iter(figures['rates'].values())):.1e}"}
        self.bar.set_postfix(shown | {"questions_s": f"{line['questions_per_second']:.1f}"})

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Add a line to the log; for the first process alone.

        Raises:
            UserError: it cannot be written.
        """
        self.log.write(step, line)

    def ask(self, run: Run) -> None:
        """Let the model answer the questions of `samples.html`; it is in eval mode afterwards."""
        if self.main:
            with run.accelerator.autocast():  # trained parts are in float32, frozen ones may not be
                self.sheet.update(run.model.eval(), run.progress.step)

    def draw(self) -> None:
        """Bring `loss.png` up to date."""
        if self.main:
            self.log.draw()

    def close(self) -> None:
        """Finish bar, log and trackers."""
        self.bar.close()
        if self.main:
            self.log.close()
