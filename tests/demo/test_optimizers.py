"""The steps of the demo's pretraining: those of torch's Muon, in one process or several."""

import torch

from demo.optimizers import Muon, make_optimizers, set_rate, take_step


def two_steps(gradients):
    """Take a step for each row of `gradients` (2, 40); return the weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 1, bias=False))
    optimizers = make_optimizers(model, model[0], peak=4e-3)
    set_rate(optimizers, 1.0)
    for row in gradients:
        for weight, part in zip(model.parameters(), row.split([32, 8]), strict=True):
            weight.grad = part.reshape(weight.shape).clone()
        take_step(optimizers, model)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def step_in_a_process(rank, folder, gradients):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(two_steps(gradients[rank]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_step_by_the_mean_of_their_gradients(tmp_path):
    gradients = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(1))  # (processes, steps, weights)
    torch.multiprocessing.spawn(step_in_a_process, (tmp_path, gradients), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, two_steps(gradients.mean(0)))
    assert not torch.allclose(first, two_steps(gradients[0]))


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's class then computes in float64
    torch.manual_seed(0)
    shapes = [(6, 6), (6, 6), (12, 6), (4, 6)]
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizers = [
        Muon(ours, 4e-3),
        torch.optim.Muon(theirs, lr=4e-3, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) + step
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 - step / 10)
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        assert moved > 0.005
        assert (mine - other).norm() < 1e-10 * moved  # float64, and products of another size
