"""The training loop: samples in, checkpoints out. Called by `train.py`.

One optimizer step reads `setting.accumulation` micro-batches on each process. Its loss is the sum over all of them
divided by their supervised tokens, so neither accumulation nor the number of processes changes what is learned. Nothing
changes before loss and gradient are known to be finite.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from batch import Batch
from errors import UserError
from training import state
from training.batches import make_loader
from training.build import Run
from training.checks import count_tokens, require_finite, step_figures
from training.due import after_error, after_step, save_before_ending
from training.signals import SIGNALS, StopSignals
from training.watch import Watch


class Trainer(Run):
    """Makes the steps of a run; arguments as `Run`."""

    def run(self) -> Path:
        """Train to the end and return the last checkpoint folder.

        Raises:
            SystemExit: 128 + the number of a signal, after a checkpoint of the last whole step.
            UserError: a bad photo or question, a non-finite loss, too little memory, or a disk without room.
        """
        state.make_ready(self)
        self.saved_step, watch = self.progress.step, Watch(self)
        try:
            with self.stop:
                for figures in self.steps():
                    after_step(self, watch, figures)
                    if figures["signal"]:
                        save_before_ending(self, "stopped by a signal")
                        raise SystemExit(128 + figures["signal"])
        except (UserError, RuntimeError, MemoryError) as error:
            problem = after_error(self, error)
            if problem is None or problem is error:
                raise
            raise problem from error
        finally:
            watch.close()
        return self.output_dir / f"checkpoint-{self.progress.step}"

    def forward(self, batch: Batch, num_items: int) -> torch.Tensor:
        """The loss of a micro-batch, in the wrapper that synchronises gradients; see `MMultiModal.loss`."""
        return self.wrapped(batch.to(self.accelerator.device), num_items)

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


def optimizer_step(
    run: Trainer, batches: Sequence[Batch | str], indices: list[list[int]], last_of_epoch: bool, stop: StopSignals
) -> dict[str, Any]:
    """Learn from the micro-batches of this process, move `run.progress` on, and return the figures of the step.

    Args:
        batches: from the loader; all processes have equally many.
        indices: samples of all processes' micro-batches, in turn.
        stop: holds the signal that this process got; `figures["signal"]` is what any process got, or 0.

    Raises:
        NonFiniteError: nothing was learned; names the samples.
        AgreedError: a batch that is a sentence about an error, or too many photos that cannot be read.
    """
    sound, supervised, tokens = count_tokens(run, batches)
    run.wrapped.train()
    device, processes = run.accelerator.device, run.accelerator.num_processes
    total = torch.zeros((), device=device)
    finite = []
    for number, batch in enumerate(sound):
        last = number == len(sound) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.wrapped):
            # gradients are averaged over processes, the loss is meant to be summed
            loss = run.forward(batch, max(supervised, 1)) * processes
            run.accelerator.backward(loss)
        total += loss.detach()
        finite.append(loss.detach().isfinite())
    signals = torch.tensor([float(stop.received == number) for number in SIGNALS], device=device)
    loss_value, *signals = run.accelerator.reduce(torch.cat([total.unsqueeze(0), signals]), reduction="mean").tolist()
    gradient_norm = float(run.accelerator.clip_grad_norm_(run.wrapped.parameters(), run.config.train.max_grad_norm))
    require_finite(run, loss_value, gradient_norm, torch.stack(finite).tolist(), indices)
    figures = step_figures(run, sound) | {
        "loss": loss_value,
        "grad_norm": gradient_norm,
        "supervised_tokens": supervised,
        "tokens": tokens,
        "signal": next((int(number) for number, count in zip(SIGNALS, signals, strict=True) if count), 0),
    }
    run.whole_step = False  # while weights and position change, no checkpoint can be made
    run.optimizer.step()
    if not run.optimizer.step_was_skipped:  # by fp16's scaler; torch warns of a schedule that begins before the steps
        run.schedule.step()
    run.progress.advance(sum(map(len, indices)), last_of_epoch, device)
    run.whole_step = True
    run.optimizer.zero_grad()
    return figures
