"""Label a folder by workers on a Ray cluster, or on this machine: the driver keeps the ledger, workers hold the model.

    plan -> jobs -> workers: label_some -> records -> the driver: the ledger

Results are named by the plan and written all or nothing, and only the driver notes what is complete. So whatever dies,
a worker, its machine or the driver, the same command makes what is missing, and nothing twice. Needs the extra `ray`.
"""

import os
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Generic, TypeAlias, TypeVar

from opensan.errors import UserError, install, reason
from opensan.files import absolute
from opensan.jobs.folder import Broken, FolderRun, Job, Question, Written, label_some
from opensan.jobs.ledger import LOCK, settings_key

TRIES = 3
"""Deaths of workers that an image may cause before it counts as broken."""

AHEAD = 2
"""Calls that a worker has at a time: while it answers, it has the next one already."""

_PATIENCE = 60.0
"""Seconds without any worker until a message says so."""

_ADDRESS = re.compile(r"(?:ray://)?(?P<host>[^/:]+|\[[^]]+\]):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Described:
    """A worker's model, without the model: the attributes that a run's settings are made of."""

    node: str
    """Address of the worker's machine."""
    identity: Any
    speed: str
    dtype: str
    calibration: Any
    question: Question
    """The run's question, as the worker's model takes it."""


@dataclass(frozen=True)
class Refusal:
    """Answer of a worker that can't take part."""

    reason: str


@dataclass(frozen=True)
class End:
    """Answer of a worker that met an error which every other image would meet too, such as a full disk."""

    reason: str


Answer: TypeAlias = list[Written | Broken] | Refusal | End

Description = TypeVar("Description")
"""Type of a worker's description."""

Done = TypeVar("Done")
"""Type of a worker's result for a job that is not broken."""


class Worker:
    """A model in a process of its own, of which Ray makes an actor."""

    def __init__(self, loading: Mapping[str, Any], question: Question, rest: bool) -> None:
        """`loading` are the arguments of `opensan.load`; errors are told by `describe`."""
        import ray

        from opensan.segmenters.load import load

        self._node = ray.util.get_node_ip_address()
        self._refusal: Refusal | None = None
        try:
            self._segmenter = load(**loading)
            self._segmenter.prepare_words(question.vocabulary)
            if rest:
                question = replace(question, vocabulary=self._segmenter.with_rest(question.vocabulary))
        except UserError as error:
            self._refusal = Refusal(f"the worker on {self._node}: {error}")
        self._question = question

    def describe(self) -> Described | Refusal:
        """Return what the run's settings are made of, or why the worker can't take part."""
        if self._refusal:
            return self._refusal
        segmenter = self._segmenter
        return Described(
            self._node,
            segmenter.identity,
            str(segmenter.speed),
            str(segmenter.dtype),
            getattr(segmenter, "calibration", None),
            self._question,
        )

    def label(self, key: str, jobs: Sequence[Job]) -> Answer:
        """Label images and write their files; `key` is that of the run's settings."""
        if self._refusal:
            return self._refusal
        if settings_key(self._question.settings(self._segmenter)) != key:
            return Refusal(f"the worker on {self._node}: has another model, or another version of it")
        if not (self._question.out / LOCK).is_file():
            return Refusal(f"the worker on {self._node}: does not see {self._question.out}; all machines must share it")
        try:
            return label_some(self._segmenter, self._question, jobs)
        except UserError as error:
            return End(str(error))


@dataclass(eq=False)
class _Hired:
    """A worker as the driver sees it."""

    actor: Any
    calls: deque[Any] = field(default_factory=deque)
    """Its calls without an answer, the first of which it is working on."""


def check_ray() -> None:
    """Raise UserError, one line, if Ray is not installed."""
    if find_spec("ray") is None:
        raise UserError(f"--on ray needs Ray, which is not installed: {install('ray')}")


def gpus_each(device: str, per_gpu: int = 1) -> float:
    """Return the share of a GPU that each worker asks Ray for. Raises UserError for a device that Ray can't give."""
    import ray

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: each worker gets its device from Ray: choose auto, cpu or cuda")
    return 1 / per_gpu if device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU")) else 0


@contextmanager
def cluster(address: str | None, workers: int, *, twice: bool = False, store: int = 80 << 20) -> Iterator[int]:
    """Connect to a Ray cluster, by default that of RAY_ADDRESS; without any, start one on this machine.

    Yields the cores, and so torch's threads, for each of `workers`: this machine is divided among them.

    Args:
        address: the cluster's.
        workers: processes that work at a time.
        twice: whether a cluster on this machine has room for as many again, which take over from the first.
        store: bytes of a cluster's object store on this machine. By default little, because the workers of a folder
            get paths and return figures.

    Raises:
        UserError: one line, if the cluster can't be reached.
    """
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its authors
    os.environ.setdefault("RAY_worker_niceness", "0")  # of workers on this machine: as this command, not below all else
    import ray

    if ray.is_initialized():
        yield 1
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    cpus = 1 if address else max(1, (os.cpu_count() or 1) // workers)
    try:
        if address:
            _check_port(address)
            ray.init(address=address, **quiet)
        else:
            cores = workers * cpus * (2 if twice else 1)
            ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=store, **quiet)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the Ray cluster at {address or 'this machine'} can't be reached ({reason(error)})") from None
    # Ray tells of dead workers on stdout, where results are, and has no setting for it; `Workers` tells of them itself.
    sys.modules["ray._private.worker"].__dict__["_worker_logs_enabled"] = False
    try:
        yield cpus
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise UserError if nobody answers at host:port; Ray itself would try for minutes."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        if address not in ("auto", "local"):
            raise UserError(f"--address {address}: must be HOST:PORT, ray://HOST:PORT, or auto")
        return
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"the Ray cluster at {address} can't be reached ({reason(error)})") from None


class Pool(Generic[Description, Done]):
    """Workers that are being started, at work, or replaced when they die. Use within `cluster`.

    A worker is made of a class with two methods: `describe`, which returns what it is or a Refusal, and one that takes
    a key and jobs and returns for each job what became of it, or a Refusal.
    """

    def __init__(
        self,
        count: int,
        kind: type,
        method: str,
        loading: Mapping[str, Any],
        *arguments: Any,
        cpus: int = 1,
        per_gpu: int = 1,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start `count` workers of `cpus` cores, `per_gpu` of which share a GPU; `note` gets messages, one line each.

        Each is `kind(loading, *arguments)`, and does its jobs by `method`; `loading` are arguments of `opensan.load`.

        Raises UserError for a device that Ray can't give.
        """
        import ray

        gpus = gpus_each(str(loading.get("device", "auto")), per_gpu)
        self._needs = f"{cpus} CPUs and {gpus:g} GPUs"
        actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(kind)
        self._hire = lambda: actor.remote(dict(loading), *arguments)
        self._method = method
        self._note = note
        self._starting: dict[Any, _Hired] = {}
        self._ready: list[_Hired] = []
        self._described: Description | None = None
        self.died = False
        """Whether a worker died while it worked, and so may have left a temporary file."""
        self._failed = 0
        """Workers that died while they started, since the last that did not."""
        self._most_failed = TRIES * count
        self._refusal = "no worker could start"
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        actor = self._hire()
        self._starting[actor.describe.remote()] = _Hired(actor)

    def first(self) -> Description:
        """Return the description of the first worker, once it is there. Raises UserError if none can start."""
        while self._described is None:
            self._check()
            for ref in self._wait(list(self._starting)):
                self._started(ref)
        return self._described

    def _check(self) -> None:
        if not self._starting and not self._ready:
            raise UserError(self._refusal)

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Return those of `refs` that are done, at least one; says so when there is no worker for long."""
        import ray

        since, told = time.monotonic(), False
        while True:
            done, _ = ray.wait(refs, num_returns=1, timeout=1)
            if done:
                return ray.wait(refs, num_returns=len(refs), timeout=0)[0]
            if not self._ready and not told and time.monotonic() - since > _PATIENCE:
                told = True
                free = ray.available_resources()
                cpus, gpus = free.get("CPU", 0), free.get("GPU", 0)
                self._note(
                    f"waiting for a worker, which needs {self._needs}: the cluster has {cpus:g} and {gpus:g} free; it "
                    "may be adding machines, or the models are being loaded"
                )

    def _started(self, ref: Any) -> None:
        """Take a worker that has started into service, or say why not."""
        import ray

        worker = self._starting.pop(ref)
        try:
            described = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            self._failed += 1
            self._refusal = f"workers die while they start ({_cause(error)})"
            if self._failed < self._most_failed:
                self._start()
            return
        except ray.exceptions.RayError as error:
            raise UserError(f"a worker can't start ({_cause(error)})") from None
        if isinstance(described, Refusal):
            self._dismiss(worker, described)
        else:
            self._failed = 0
            self._ready.append(worker)
            self._described = self._described or described

    def _dismiss(self, worker: _Hired, refusal: Refusal) -> None:
        import ray

        self._refusal = refusal.reason
        self._note(f"{refusal.reason}: it is not used")
        if worker in self._ready:
            self._ready.remove(worker)
        ray.kill(worker.actor)

    def work(self, key: str, jobs: Sequence[Job], batch: int = 1) -> Generator[list[Done | Broken]]:
        """Yield the results of `jobs` as they come, several at a time. Raises UserError where none can be made.

        `key` is that of the run's settings, by which a worker knows whether it can take part.
        """
        waiting = deque(list(jobs[start : start + batch]) for start in range(0, len(jobs), batch))
        busy: dict[Any, tuple[_Hired, list[Job]]] = {}
        deaths: dict[str, int] = {}
        while waiting or busy:
            for worker in self._ready:
                while waiting and len(worker.calls) < AHEAD:
                    group = waiting.popleft()
                    ref = getattr(worker.actor, self._method).remote(key, group)
                    worker.calls.append(ref)
                    busy[ref] = worker, group
            self._check()
            results: list[Done | Broken] = []
            for ref in self._wait([*self._starting, *busy]):
                if ref in self._starting:
                    self._started(ref)
                    continue
                if ref not in busy:  # of a worker that was dismissed or died, given back already
                    continue
                worker, group = busy.pop(ref)
                answer = self._answer(ref)
                if isinstance(answer, list):
                    worker.calls.remove(ref)
                    results += answer
                    continue
                if isinstance(answer, End):
                    raise UserError(answer.reason)
                lost = {call: group if call == ref else busy.pop(call)[1] for call in worker.calls}
                if isinstance(answer, Refusal):
                    self._dismiss(worker, answer)
                else:
                    self._ready.remove(worker)
                    self._start()
                    self.died = True
                    self._note("a worker died: another is started, and its images are given out again")
                    if len(culprits := lost[worker.calls[0]]) == 1:  # it was working on this image
                        (job,) = culprits
                        deaths[job.stem] = deaths.get(job.stem, 0) + 1
                        if deaths[job.stem] == TRIES:
                            lost.pop(worker.calls[0])
                            results.append(Broken(job, f"{job.image}: {TRIES} workers died while they worked on it"))
                for jobs_again in lost.values():  # at the end, as another kill may be near; singly, to find a culprit
                    waiting.extend([job] for job in jobs_again)
                worker.calls.clear()
            if results:
                yield results

    def _answer(self, ref: Any) -> list[Done | Broken] | Refusal | End | None:
        """Return a worker's answer; None if it died."""
        import ray

        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, BaseException) else error) from None
        except ray.exceptions.RayActorError:
            return None


class Workers(Pool[Described, Written]):
    """Workers that label the images of a folder's run."""

    def __init__(
        self, count: int, loading: Mapping[str, Any], question: Question, *, rest: bool = False, **options: Any
    ) -> None:
        """Start `count` workers; the arguments are those of `Worker`, and `options` those of `Pool`."""
        question = replace(question, out=absolute(question.out))
        super().__init__(count, Worker, "label", loading, question, rest, **options)


def _cause(error: BaseException) -> str:
    """Return the last line of Ray's message, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return reason(RuntimeError(lines[-1] if lines else type(error).__name__))


class RayRun(FolderRun):
    """A run over a folder, as FolderRun, whose images are labelled by `workers`."""

    def __init__(self, workers: Workers, jobs: Sequence[Job], *, batch: int = 1) -> None:
        """Wait for the first worker. Raises UserError, one line, if none can start, and as FolderRun does."""
        described: Any = workers.first()
        question = described.question
        super().__init__(
            described,
            question.vocabulary,
            jobs,
            question.out,
            question.formats,
            batch=batch,
            rules=question.rules,
            threshold=question.threshold,
        )
        self._workers = workers
        self._key = settings_key(question.settings(described))

    def labelled(self) -> Generator[Written | Broken]:
        """Have the pending jobs done, in any order, and note what is complete."""
        own = {job.stem: job for job in self.pending}
        sent = [Job(absolute(job.image), job.stem) for job in self.pending]
        for results in self._workers.work(self._key, sent, self._batch):
            self._ledger.add_all([result.record for result in results if isinstance(result, Written)])
            for result in results:
                yield replace(result, job=own[result.job.stem])
        if self._workers.died:  # nobody writes any more
            self._ledger.remove_left_over(path for job in self.pending for path in self._question.paths(job))
