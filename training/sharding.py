"""The loss on several processes: with all weights on each, or sharded (`train.shard`) by torch's FSDP2.

Sharded, each process keeps its share of every weight, gradient and optimizer state. A decoder layer is gathered while
it computes; the embedding, `lm_head`, the projector and the encoder are gathered together during the whole pass,
because a batch without photos does not call the encoder, and all processes must gather the same weights in the same
order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from compat import send_no_gradients_of
from config import Config
from errors import UserError
from model.model import LossOf, MMultiModal


def check_shardable(config: Config, processes: int, precision: str) -> None:
    """Raise UserError for settings that do not work with `train.shard`."""
    train = config.train
    problem = {
        "with several processes only: start it with torchrun --nproc-per-node N": processes == 1,
        "without fp16's scaler: set train.precision=bf16 or float32": precision == "fp16",
        "with unquantised weights: set llm.quantization=none": config.llm.quantization != "none",
        "without compilation: set train.compile=false": train.compile,
        "with given sizes, since the trial passes differ by process: set train.micro_batch to a number and "
        "train.gradient_checkpointing to on or off": "auto" in (train.micro_batch, train.gradient_checkpointing),
    }
    for remedy, wrong in problem.items():
        if wrong:
            raise UserError(f"'train.shard' works {remedy}, or set train.shard=false")


def shard(accelerator: Accelerator, loss: LossOf) -> torch.nn.Module:
    """Shard the weights in place; the parts of the model then hold the shards. The loss averages gradients.

    The model may still be on the CPU: each layer moves to the device and is cut before the next one follows.
    """
    model, device = loss.model, accelerator.device
    names = {id(parameter): name for name, parameter in loss.named_parameters()}
    language_model = model.language_model
    language_model.whole_layers = True  # a layer is gathered when it is called as a module
    # without it, a batch without photos would not go back through frozen layers, which other processes gather then
    language_model.enable_input_require_grads()
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for layer in language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    sharded = dict(loss.named_parameters())
    for part in model.parts:
        part.parameters = {name: sharded[names[id(weight)]] for name, weight in part.parameters.items()}
    return accelerator.prepare_model(loss, evaluation_mode=True)  # only autocast


def wrap(accelerator: Accelerator, model: MMultiModal) -> torch.nn.Module:
    """Wrap the loss for several processes, each with all weights or, with `train.shard`, with its share of them.

    Frozen tensors are equal on all processes; whole ones are not sent.

    Raises:
        UserError: all tensors are frozen.
    """
    loss = LossOf(model)
    if not any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError("'train.parts': nothing is trained: give a part a learning rate above 0")
    if model.config.train.shard:
        return shard(accelerator, loss)
    frozen = [name for name, parameter in loss.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in loss.named_buffers()]
    send_no_gradients_of(loss, [*frozen, *buffers])
    return accelerator.prepare(loss)


def whole(value: Any, kept: bool = True) -> Any:
    """Return a structure with whole tensors in the place of shards; all processes call it together.

    Args:
        kept: False: with empty ones, on a process that only has to take part.
    """

    def gathered(shard: DTensor) -> torch.Tensor:
        tensor = shard.full_tensor()
        return tensor.cpu() if kept else torch.empty(0)

    return tree_map_only(DTensor, gathered, value)


@contextmanager
def whole_parts(model: MMultiModal, kept: bool) -> Iterator[None]:
    """Put whole tensors in the place of the parts' shards, for a checkpoint; `kept` as in `whole`."""
    shards = [part.parameters for part in model.parts]
    for part in model.parts:
        part.parameters = whole(part.parameters, kept)
    try:
        yield
    finally:
        for part, parameters in zip(model.parts, shards, strict=True):
            part.parameters = parameters


def shards_of(state: dict[Any, Any], optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Return the state of an optimizer with its tensors sharded as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(value: Any, like: torch.Tensor) -> Any:
        if isinstance(like, DTensor) and torch.is_tensor(value) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value

    return {
        index: {name: cut(value, parameters[index]) for name, value in values.items()}
        for index, values in state.items()
    }
