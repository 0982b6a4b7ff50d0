"""Distribute a training task over processes and reduce its memory, without changes to the model's code."""

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
    """Return the task to call, the groups to optimise and the blocks to checkpoint, distributed as `parallel` says.

    `ddp`: every process holds the whole task, and gradients are averaged. `fsdp`: a copy of the task whose parameters
    are split over the processes and gathered block by block when needed; the task itself goes to the CPU and waits for
    `copy_back`. In a single process both do nothing.
    """
    groups, blocks = list(groups), list(blocks)
    if world_size() == 1:
        return task, groups, blocks
    if parallel == "ddp":
        # DistributedDataParallel copies the main process's parameters to the others here.
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
        replace(group, parameters=tuple(split_parameters[parameter_names[id(old)]] for old in group.parameters))
        for group in groups
    ]
    return split, groups, split_blocks


@contextmanager
def gradients_exchanged(model: nn.Module, exchanged: bool) -> Iterator[None]:
    """Make backward passes of forward passes inside average gradients over processes, or only sum them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchanged)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not exchanged else nullcontext():
        yield


@contextmanager
def whole_task(
    task: nn.Module, own: Sequence[ParameterGroup], trained: Sequence[ParameterGroup], device: torch.device
) -> Iterator[None]:
    """Give the original task the trained values, on `device`, for the `with` block. Every process must enter.

    If the task itself is trained, it has them already.
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
    """Return `tensor` as one piece; if it is split, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Split a whole `tensor` over the processes, and move it to the device, as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict with whole tensors. Every process must call this."""
    state = optimizer.state_dict()
    entries = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that `optimizer_state` returned."""
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
    """Make the blocks keep only their inputs for the backward pass and compute the rest again in it.

    Gradients are the same; the price is a second forward pass of the blocks.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
