"""The training loop: samples in, checkpoints out. Called by `train.py`.

One optimizer step reads `setting.accumulation` micro-batches on each process. Its loss is the sum over all of them
divided by their supervised tokens, so neither accumulation nor the number of processes changes what is learned.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError, is_out_of_memory
from training import state
from training.agreement import AgreedError, on_main
from training.batches import make_loader
from training.build import Run
from training.costs import peak_memory
from training.figures import summarise
from training.step import NonFiniteError, optimizer_step
from training.validation import validate
from training.watch import Watch


class Trainer(Run):
    """Makes the steps of a run; arguments as `Run`.

    Attributes:
        last_figures: the newest value of each logged figure.
    """

    def run(self) -> Path:
        """Train to the end and return the last checkpoint folder.

        Raises:
            SystemExit: 128 + the number of a signal, after a checkpoint of the last whole step.
            UserError: a bad photo or question, a non-finite loss, too little memory, or a disk without room.
        """
        state.make_ready(self)
        self.saved_step, self.watch = self.progress.step, Watch(self)
        try:
            with self.stop:
                for figures in self.steps():
                    self._after_step(figures)
                    if figures["signal"]:
                        self._save_before_ending("stopped by a signal")
                        raise SystemExit(128 + figures["signal"])
        except (UserError, RuntimeError, MemoryError) as error:
            problem = user_problem(error, self.progress.step)
            if problem is None:
                raise
            self.optimizer.zero_grad()
            # saving is collective; if one process raised alone, the others will not join it
            together = self.accelerator.num_processes == 1 or isinstance(error, AgreedError)
            if together and self.whole_step and not isinstance(error, NonFiniteError):
                self._save_before_ending("interrupted")
            if problem is error:
                raise
            raise problem from error
        finally:
            self.watch.close()
        return self.output_dir / f"checkpoint-{self.progress.step}"

    def _after_step(self, figures: dict[str, Any]) -> None:
        """Log, validate and save if this step is due for it."""
        train, step, device = self.config.train, self.progress.step, self.accelerator.device
        last = step == self.total_steps
        self.progress.window.append(figures)
        line = summarise(self.progress.window, self.matrix_peak, peak_memory(device))
        self.watch.step(figures, line)
        evaluating = last or (train.eval_steps is not None and step % train.eval_steps == 0)
        if evaluating := evaluating and not figures["signal"]:
            line |= validate(self) if self.val_samples else {}
            if not math.isfinite(line.get("val_loss", 0.0)):
                self.say(
                    f"the validation loss at step {step} is {line['val_loss']}: the weights overflow in evaluation"
                )
            self.watch.ask(self)
        self.last_figures |= line
        if evaluating or step == 1 or step % train.log_steps == 0:
            on_main(self.accelerator, lambda: self.watch.write(step, line))
            self.progress.window.clear()
        if last or step % train.save_steps == 0:
            self._save()
            self.watch.draw()

    def _save(self, pruning: bool = True) -> Path:
        self.saved_step = self.progress.step  # set before saving, so that a failed save is not tried again
        return state.save(self, self.progress, self.last_figures, pruning)

    def _save_before_ending(self, reason: str) -> None:
        if self.progress.step != self.saved_step:
            folder = self._save(pruning=False)
            self.say(f"{reason}: {folder} holds all so far, continue with --resume auto")

    def steps(self) -> Iterator[dict[str, Any]]:
        """Make optimizer steps until the run is over, yielding the figures of each (see `figures.summarise`)."""
        rank, processes, progress = self.accelerator.process_index, self.accelerator.num_processes, self.progress
        own_batches: list[list[int]] = []  # the loader reads this list again in each epoch
        epoch_loader = make_loader(
            self.train_set,
            own_batches,
            self.config.train.workers,
            self.accelerator.device,
            self.stop,
            at_once=self.setting.accumulation,
            persistent=True,
        )
        while progress.step < self.total_steps:
            remaining = self.epoch_batches(progress.epoch, progress.samples)
            own_batches[:] = remaining[rank::processes]
            loader = iter(epoch_loader)
            epoch_samples = progress.samples + sum(map(len, remaining))
            for start in range(0, len(remaining), self.batches_per_step):
                began = time.perf_counter()
                indices = remaining[start : start + self.batches_per_step]
                batches = [next(loader) for _ in indices[rank::processes]]
                waited = time.perf_counter() - began
                last_of_epoch = start + self.batches_per_step >= len(remaining)
                epoch = progress.epoch + (progress.samples + sum(map(len, indices))) / epoch_samples
                figures = optimizer_step(self, batches, indices, last_of_epoch, self.stop)
                yield figures | {
                    "epoch": epoch,
                    "questions": sum(len(self.train_set.groups[index]) for batch in indices for index in batch),
                    "seconds": time.perf_counter() - began,
                    "waited": waited,
                }
                if progress.step >= self.total_steps:
                    return
            if not remaining:  # a run resumed with other step sizes may have too few samples left in its epoch
                progress.epoch, progress.samples = progress.epoch + 1, 0


def user_problem(error: Exception, step: int) -> UserError | None:
    """What the user can mend about an error after `step` steps; None for a defect."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return UserError(
            f"out of memory at step {step + 1}: lower train.micro_batch and raise train.accumulation by as much, or "
            "set train.gradient_checkpointing=on or llm.quantization=nf4, or lower train.max_questions or "
            "data.max_length (train.py --dry-run tells what fits)"
        )
    if str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is at that moment
        return UserError(
            f"the system ended a process that reads photos at step {step + 1}, most likely for lack of memory ("
            f"{str(error).splitlines()[0]}): lower train.workers, or close other programs"
        )
    return None
