"""Several processes that train together, as torchrun would start them, for tests."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable

import torch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(action: Callable[[], None], world: int = 2) -> list[multiprocessing.Process]:
    """Start `action` in `world` processes with torchrun's variables. Forked, so that torch is not imported again."""
    port = free_port()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        action()

    # An earlier test's garbage may own threads, as video decoders do: a child that collects it waits for them for ever.
    gc.collect()
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_ranks(action: Callable[[], None], world: int = 2) -> None:
    """Run `action` in `world` processes; an exception in any of them fails."""
    processes = start_ranks(action, world)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
