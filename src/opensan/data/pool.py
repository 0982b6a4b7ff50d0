"""Many small pieces of work in several processes."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from opensan.errors import UserError

_FEW = 32
"""Starting processes takes longer than this many photographs."""
_CHUNK = 4
"""Tasks that go to a process at a time."""

Result = TypeVar("Result")


def run_all(tasks: Sequence[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """The tasks' results, in their order. Tasks are picklable; with one worker, or few tasks, all is done right here.

    Raises ValueError if a process died. To leave off early, close the iterator.
    """
    if workers == 1 or len(tasks) < _FEW:
        yield from (task() for task in tasks)
        return
    # Not forked: whoever calls may have threads (torch, a progress bar), and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_follow_parent)
    try:
        yield from pool.map(_call, tasks, chunksize=_CHUNK)
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); the same command goes on, try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _call(task: Callable[[], Result]) -> Result:
    return task()


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and don't outlive it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
