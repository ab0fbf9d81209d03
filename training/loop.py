"""Training loop from samples to checkpoints. Called by `stages.py`.

One optimizer step reads `setting.accumulation` micro-batches on each process. Its loss is the sum over all
micro-batches divided by their supervised tokens. The result is therefore independent of accumulation and of the number
of processes. Weights change only after loss and gradient have been checked to be finite.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from batch import Batch
from errors import UserError
from training import state
from training.batches import EpochBatches, make_loader
from training.build import Run
from training.checks import count_tokens, require_finite, step_figures
from training.due import after_error, after_step, save_before_ending
from training.signals import SIGNALS, StopSignals
from training.watch import Watch


class Trainer(Run):
    """Training loop of a run; arguments as in `Run`."""

    def run(self) -> Path:
        """Train to the end and return the last checkpoint folder.

        Raises:
            SystemExit: 128 + the number of a signal, after saving a checkpoint of the last whole step.
            UserError: a bad photo or question, a non-finite loss, too little memory, or a full disk.
        """
        state.make_ready(self)
        self.saved_step = self.progress.step
        with ExitStack() as at_end:
            at_end.callback(self.in_use.release)
            watch = Watch(self)
            at_end.callback(watch.close)
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
        return self.output_dir / f"checkpoint-{self.progress.step}"

    def forward(self, batch: Batch, num_items: int) -> torch.Tensor:
        """Compute the loss of a micro-batch through the wrapper that synchronises gradients; see `MMultiModal.loss`."""
        return self.wrapped(batch.to(self.accelerator.device), num_items)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Run optimizer steps to the end of the run; yield the figures of each (see `figures.summarise`)."""
        rank, processes, progress = self.accelerator.process_index, self.accelerator.num_processes, self.progress
        own_batches = EpochBatches()  # refilled for each epoch; the loader keeps a reference to it
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
            own_batches.now = remaining[rank::processes]
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
                del batches  # before the next ones come: memory, and the files by which processes hand tensors over
                yield figures | {
                    "epoch": epoch,
                    "questions": sum(len(self.train_set.groups[index]) for batch in indices for index in batch),
                    "seconds": time.perf_counter() - began,
                    "waited": waited,
                }
                if progress.step >= self.total_steps:
                    return
            if not remaining:  # after a resume with other step sizes, too few samples of the epoch may be left
                progress.epoch, progress.samples = progress.epoch + 1, 0


def optimizer_step(
    run: Trainer, batches: Sequence[Batch | str], indices: Sequence[list[int]], last_of_epoch: bool, stop: StopSignals
) -> dict[str, Any]:
    """Train on the micro-batches of this process, advance `run.progress`, and return the figures of the step.

    Args:
        batches: micro-batches from the loader; every process has the same number.
        indices: sample indices of the micro-batches of all processes; they alternate between processes.
        stop: the signal that this process received; `figures["signal"]` is the signal of any process, or 0.

    Raises:
        NonFiniteError: loss or gradient is not finite. The weights are unchanged; the message names the samples.
        AgreedError: a batch is an error message, or too many photos cannot be read.
    """
    sound, supervised, tokens = count_tokens(run, batches)
    run.wrapped.train()
    device, processes = run.accelerator.device, run.accelerator.num_processes
    total = torch.zeros((), device=device)
    finite = []
    for number, batch in enumerate(sound):
        last = number == len(sound) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.wrapped):
            # DDP averages gradients over processes, but the loss is a sum over processes
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
    run.whole_step = False  # while weights and position change, no checkpoint may be saved
    run.optimizer.step()
    # skipped by the fp16 scaler, of which accelerate does not see what a fused optimizer skips by itself; torch warns
    # if the schedule steps first
    if not run.optimizer.step_was_skipped and math.isfinite(gradient_norm):
        run.schedule.step()
    run.progress.advance(sum(map(len, indices)), last_of_epoch, device)
    run.whole_step = True
    run.optimizer.zero_grad()
    return figures
