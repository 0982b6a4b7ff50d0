"""Let processes that torchrun started work together. In a single process these functions change nothing.

with process_group(device) as group:
    ...  # work on group.device; what is shared is summed with `sum_over_ranks`
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensan.errors import UserError

Result = TypeVar("Result")

LONGEST_WAIT = timedelta(hours=2)
"""Time to wait for a busy rank. Long, because one rank may write or embed alone; torchrun detects dead ranks itself."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place in the group of processes."""

    rank: int
    world_size: int
    device: torch.device
    """This process's own device."""


@contextmanager
def process_group(device: torch.device | str = "cpu") -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started (it sets RANK, WORLD_SIZE and LOCAL_RANK).

    A process started in any other way is a group of its own; inside an open group, that group is used. `device`
    without a number becomes this process's own one: `cuda` on local rank 3 is `cuda:3`.
    Raises ValueError when there are more processes on this machine than devices.
    """
    device = _own_device(torch.device(device))
    opens = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if opens:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield ProcessGroup(rank(), world_size(), device)
    finally:
        if opens:
            dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(
                f"device cuda: process {local + 1} on this machine needs one of its own, and there are {count}"
            )
        device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Return whether this is the main process, which writes files and messages."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _together():
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of all ranks' `tensor` (equal shapes), bitwise equal on every rank; `tensor` is unchanged."""
    if not _together():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, by rank, on every rank. For small plain data, which is pickled."""
    if not _together():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], Result]) -> Result:
    """Call `action` in the main process only; every rank gets its result, or the UserError or OSError it raised."""
    if not _together():
        return action()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
