"""Options of commands that can work on many machines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.choices import Engine
from opensan.cli.terminal import SMALLER, UsageError, complain, note, telling_of_memory

if TYPE_CHECKING:
    from opensan.jobs.folder import FolderRun, Job, Question

MACHINES = "Many machines"
"""Group of options in the help."""


On = Annotated[
    Engine | None,
    typer.Option(
        "--on",
        help="Spread images over processes or machines by Ray (needs the extra `ray`). All machines must share the "
        "folders, under the same paths.",
        show_default=False,
        rich_help_panel=MACHINES,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="With --on ray: the number of processes; each holds the model.",
        show_default=False,
        rich_help_panel=MACHINES,
    ),
]
PerGpu = Annotated[
    int,
    typer.Option(
        "--workers-per-gpu",
        min=1,
        metavar="K",
        help="With --on ray: how many processes share a GPU; while one reads or writes, another computes.",
        rich_help_panel=MACHINES,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="With --on ray: the cluster; auto finds one on this machine. Default: RAY_ADDRESS; without it, they run "
        "on this machine, and no cluster is needed.",
        show_default=False,
        rich_help_panel=MACHINES,
    ),
]


def check_engine(
    on: Engine | None, workers: int | None, address: str | None, per_gpu: int, alone: Mapping[str, object]
) -> None:
    """Raise UsageError if these options contradict each other, or those given of `alone`; UserError without Ray."""
    if on is None and (workers is not None or address is not None):
        raise UsageError("--workers and --address are for --on ray")
    if on is None and per_gpu != 1:
        raise UsageError("--workers-per-gpu is for --on ray")
    if on is None:
        return
    if workers is None:
        raise UsageError("--on ray needs --workers N: how many processes, each with the model in its memory")
    if other := next((name for name, given in alone.items() if given not in (None, False)), None):
        raise UsageError(f"--on ray is for folders and many images: leave out {other}")
    from opensan.jobs.on_ray import check_ray

    check_ray()


def loading_of(
    model: str, device: str, speed: str, dtype: str | None, max_pixels: int, calibration: Path | None
) -> dict[str, Any]:
    """Return the arguments of `opensan.load` for workers, which have another current folder."""
    source = str(Path(model).absolute()) if Path(model).exists() else model
    return {
        "source": source,
        "device": device,
        "speed": speed,
        "dtype": dtype,
        "max_pixels": max_pixels,
        "calibration": calibration and calibration.absolute(),
    }


@contextmanager
def running_on_ray(
    workers: int,
    address: str | None,
    loading: Mapping[str, Any],
    question: "Question",
    rest: bool,
    jobs: "Sequence[Job]",
    batch: int,
    per_gpu: int,
) -> "Iterator[FolderRun]":
    """Yield a run over a folder whose images are labelled by workers; `_many` opens it."""
    from opensan.jobs.on_ray import RayRun, Workers, cluster

    note(f"starting {workers} workers with {loading['source']}")
    with cluster(address, workers) as cpus, telling_of_memory("a worker", SMALLER):
        hired = Workers(workers, loading, question, rest=rest, cpus=cpus, per_gpu=per_gpu, note=complain)
        yield RayRun(hired, jobs, batch=batch)
