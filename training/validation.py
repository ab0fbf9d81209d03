"""Validation loss over all processes, also by source. Called by `due.py`."""

import torch

from training.batches import make_loader, supervised_tokens
from training.build import Run


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Compute the mean loss per supervised token on `run.val_samples`.

    Each process reads its share. The model runs without its wrapper, so the forward pass has no collective and a
    process may have no batch. With `train.shard`, all processes run the same number of batches, because they gather the
    weights together; the last ones may be repetitions, which do not count.

    Returns:
        `val_loss` and, with several sources, `val_loss/<source>`.
    """
    dataset, train = run.val_set, run.config.train
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    sources = sorted({dataset.source(index) for index in run.val_samples})
    batches = [
        (number, batch)
        for number, source in enumerate(sources)
        for batch in run.cut(dataset, [index for index in run.val_samples if dataset.source(index) == source])
    ]
    counted = len(batches[rank::processes])
    if train.shard:
        batches += batches[-1:] * (-len(batches) % processes)
    batches = batches[rank::processes]
    device = run.accelerator.device
    sums = torch.zeros(len(sources), 2, dtype=torch.float32 if device.type == "mps" else torch.float64)
    run.model.eval()
    loss_of = run.wrapped if train.shard else run.model.loss
    loader = make_loader(dataset, [batch for _, batch in batches], train.workers, device, run.stop)
    problem = None
    for place, ((number, _), batch) in enumerate(zip(batches, loader, strict=True)):
        problem = batch if isinstance(batch, str) else None
        if train.shard:
            run.agree(problem)
        if isinstance(batch, str):
            break
        with run.accelerator.autocast():  # in training, the wrapper does this
            loss = loss_of(batch.to(device), 1)
        if place < counted:
            sums[number] += torch.tensor([loss.item(), supervised_tokens(batch)], dtype=sums.dtype)
    run.agree(problem)
    totals = run.accelerator.reduce(sums.to(device)).cpu()  # (sources, 2)
    loss, tokens = totals.sum(dim=0).tolist()
    losses = {"val_loss": loss / max(tokens, 1)}
    if len(sources) > 1:
        for source, (own_loss, own_tokens) in zip(sources, totals.tolist(), strict=True):
            losses[f"val_loss/{source}"] = own_loss / max(own_tokens, 1)
    return losses
