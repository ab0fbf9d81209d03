"""Actions after an optimizer step (log, validation, checkpoint) and after an error. Called by `loop.py`."""

import math
from pathlib import Path
from typing import Any

from errors import UserError, is_out_of_memory
from training import state
from training.agreement import AgreedError, on_main
from training.build import Run
from training.checks import NonFiniteError
from training.costs import peak_memory
from training.figures import summarise
from training.movement import describe_movement, movement
from training.validation import validate
from training.watch import Watch


def after_step(run: Run, watch: Watch, figures: dict[str, Any]) -> None:
    """Log, validate and save according to the intervals in the config.

    Args:
        figures: figures of the step, from `Trainer.steps`.
    """
    train, step, device = run.config.train, run.progress.step, run.accelerator.device
    last = step == run.total_steps
    run.progress.window.append(figures)
    line = summarise(run.progress.window, run.matrix_peak, peak_memory(device))
    watch.step(figures, line)
    evaluating = last or (train.eval_steps is not None and step % train.eval_steps == 0)
    if last and figures["signal"]:
        save(run)  # first, because who sent the signal may not wait for the validation
    if evaluating := evaluating and (last or not figures["signal"]):
        line |= validate(run) if run.val_samples else {}
        if not math.isfinite(line.get("val_loss", 0.0)):
            run.say(f"the validation loss at step {step} is {line['val_loss']}: the weights overflow in evaluation")
        watch.ask(run)
    if last and run.start is not None:
        moved = movement(run.model, run.start)
        line |= {f"moved/{name}": share for name, share in moved.items()}
        run.say(describe_movement(moved))
    run.last_figures |= line
    if evaluating or step == 1 or step % train.log_steps == 0:
        on_main(run.accelerator, lambda: watch.write(step, line))
        run.progress.window.clear()
    if last or step % train.save_steps == 0:
        save(run)
        watch.draw()


def save(run: Run, pruning: bool = True) -> Path:
    """Write a checkpoint of the last whole step; see `state.save`."""
    run.saved_step = run.progress.step  # set before saving: a failed save must not be repeated
    return state.save(run, run.progress, run.last_figures, pruning)


def save_before_ending(run: Run, reason: str) -> None:
    """Write a checkpoint of the last whole step if there is none yet, and print its folder."""
    if run.progress.step != run.saved_step:
        folder = save(run, pruning=False)
        run.say(f"{reason}: {folder} holds all so far, continue with --resume auto")


def after_error(run: Run, error: Exception) -> UserError | None:
    """Save the last whole step if all processes can; return the error for the user, None for a defect."""
    problem = user_problem(error, run.progress.step, run.config.train.tokens_per_batch)
    if problem is not None:
        run.optimizer.zero_grad()
        # saving is collective; if one process raised alone, the others do not join it
        together = run.accelerator.num_processes == 1 or isinstance(error, AgreedError)
        if together and run.whole_step and not isinstance(error, NonFiniteError):
            save_before_ending(run, "interrupted")
    return problem


def user_problem(error: Exception, step: int, tokens_per_batch: int | None = None) -> UserError | None:
    """Return an error with the remedy for the user; None for a defect of the program.

    Args:
        step: number of finished steps.
        tokens_per_batch: budget of a micro-batch, where its size is not a number of samples.
    """
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        size = "micro_batch" if tokens_per_batch is None else "tokens_per_batch"
        return UserError(
            f"out of memory at step {step + 1}: lower train.{size} and raise train.accumulation by as much, or "
            "set train.gradient_checkpointing=on or llm.quantization=nf4, or lower train.max_questions or "
            "data.max_length (train.py --dry-run tells what fits)"
        )
    if str(error).startswith("DataLoader worker"):  # torch raises it at any point of the run
        return UserError(
            f"the system ended a process that reads photos at step {step + 1}, most likely for lack of memory ("
            f"{str(error).splitlines()[0]}): lower train.workers, or close other programs"
        )
    return None
