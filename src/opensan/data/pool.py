"""Run many small tasks in several processes."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from opensan.errors import UserError

_FEW = 32
"""Fewer tasks than this are faster without other processes."""
_CHUNK = 4
"""Number of tasks that a process gets at a time."""

Result = TypeVar("Result")


def run_all(tasks: Sequence[Callable[[], Result]], workers: int) -> Generator[Result]:
    """Yield the tasks' results in order. Tasks are picklable; with one worker, or few tasks, this process runs them.

    Raises UserError if a process died. To stop early, close the iterator.
    """
    if workers == 1 or len(tasks) < _FEW:
        yield from (task() for task in tasks)
        return
    # Not forked: the caller may have threads (torch, a progress bar), and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_follow_parent)
    try:
        yield from pool.map(_call, tasks, chunksize=_CHUNK)
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); the same command continues, try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _call(task: Callable[[], Result]) -> Result:
    return task()


def _follow_parent() -> None:
    """Make a worker ignore Ctrl-C, which the parent handles, and exit when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
