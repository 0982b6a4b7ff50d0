"""What is done to a task from outside: spread over processes, made to need less memory. Model code knows of neither."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from opensan.distributed import world_size
from opensan.train.optimizer import ParameterGroup

Parallel = Literal["ddp", "fsdp"]


def spread(
    task: nn.Module, groups: Sequence[ParameterGroup], blocks: Sequence[nn.Module], parallel: Parallel
) -> tuple[nn.Module, list[ParameterGroup], list[nn.Module]]:
    """What to call in place of `task`, what to optimise in place of `groups`, what is checkpointed for `blocks`.

    `ddp`: every process holds the whole task, and gradients are averaged. `fsdp`: a copy of the task whose parameters
    are split over the processes and gathered block by block when needed; the task itself goes to the CPU and waits for
    `copy_back`. In a single process both do nothing.
    """
    groups, blocks = list(groups), list(blocks)
    if world_size() == 1:
        return task, groups, blocks
    if parallel == "ddp":
        # Parameters are made equal to the main process's here.
        return DistributedDataParallel(task, gradient_as_bucket_view=True), groups, blocks
    return _shard(task, groups, blocks)


def _shard(
    task: nn.Module, groups: list[ParameterGroup], blocks: list[nn.Module]
) -> tuple[nn.Module, list[ParameterGroup], list[nn.Module]]:
    device = next(task.parameters()).device
    parameter_names = {id(parameter): name for name, parameter in task.named_parameters()}
    block_names = {id(module): name for name, module in task.named_modules()}
    split = copy.deepcopy(task)
    task.to("cpu")
    split_blocks = [split.get_submodule(block_names[id(block)]) for block in blocks]
    mesh = init_device_mesh(device.type, (world_size(),))
    # Numbers without a dimension (CLIP's logit scale) cannot be split; frozen, they are the same everywhere.
    scalars = {parameter for parameter in split.parameters() if parameter.ndim == 0 and not parameter.requires_grad}
    for module in (*split_blocks, split):
        fully_shard(module, mesh=mesh, ignored_params=scalars)
    split_parameters = dict(split.named_parameters())
    groups = [
        replace(group, parameters=tuple(split_parameters[parameter_names[id(one)]] for one in group.parameters))
        for group in groups
    ]
    return split, groups, split_blocks


@contextmanager
def gradients_exchanged(model: nn.Module, exchanged: bool) -> Iterator[None]:
    """Whether the backward pass of a forward pass inside averages gradients over the processes, or only sums them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchanged)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not exchanged else nullcontext():
        yield


@contextmanager
def whole_task(
    task: nn.Module, own: Sequence[ParameterGroup], trained: Sequence[ParameterGroup], device: torch.device
) -> Iterator[None]:
    """Inside, the task that was spread has the values reached so far, on `device`. Every process must enter.

    Where the task is itself what is trained, that is so anyway.
    """
    pairs = [
        (parameter, value)
        for mine, theirs in zip(own, trained, strict=True)
        for parameter, value in zip(mine.parameters, theirs.parameters, strict=True)
        if value is not parameter
    ]
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(whole(value))
    task.to(device)
    yield
    if pairs:
        task.to("cpu")


def whole(tensor: Tensor) -> Tensor:
    """`tensor` as one piece; where it is split, every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole `tensor` split over the processes, and on the device, as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors. Every process must ask."""
    state = optimizer.state_dict()
    entries = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up what `optimizer_state` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            name: split_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


@contextmanager
def activations_checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the blocks keep only their inputs for the backward pass, and compute the rest again in it.

    Gradients are the same; the price is a second forward pass of the blocks.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
