"""The service on Ray: replicas of the same application behind Ray Serve's HTTP proxy, and a store of their encodings.

    client -> Ray Serve's proxy -> any replica: the routes of `opensan.serve.app`, and a model -> the store

The store keeps the encodings, within the service's limits, so that every replica answers by any id; each replica keeps
copies of those that it was asked for. If the store dies, clients are told to send their images again. Needs the extra
`ray-serve`.
"""

import asyncio
import re
import secrets
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import FrameType
from typing import Any

import numpy as np

from opensan.errors import UserError, install, reason
from opensan.segmenters.results import Encoding
from opensan.serve.app import Application, create_app
from opensan.serve.cache import EncodingCache
from opensan.serve.limits import Problem, ServiceLimits
from opensan.serve.metrics import merged_pages
from opensan.serve.server import be_quiet
from opensan.serve.task_images import TaskImages

APPLICATION = "opensan"
"""Name of the application on its cluster: a second deployment of it replaces the first, without a pause."""

STORE = "opensan-encodings"
"""Name of the store's application, its own because each deployment of an application starts all its processes anew."""

OBJECT_STORE = 256 << 20
"""Bytes of Ray's object store on one machine: encodings pass through it, and larger ones through the disk."""

_STARTS = 3
"""Times that a replica may fail to start until the deployment counts as failed."""

_PATIENCE = 60.0
"""Seconds without a replica until a message says so."""

_METRICS_SECONDS = 5.0

_QUIET = {"log_level": "ERROR", "enable_access_log": False}

_WRONG = re.compile(r"UserError: (.+)")
"""A replica's UserError, in the traceback that Ray Serve keeps of it."""


@dataclass(frozen=True)
class Deployment:
    """Settings of a service's replicas."""

    loading: Mapping[str, Any]
    """Arguments of `opensan.load`."""
    replicas: int = 1
    cpus: float = 1
    """Cores of each replica, and its torch's threads."""
    gpus: float = 0
    """GPUs of each replica; a share lets several use one."""
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    token: str | None = None
    batch: int = 4
    hosts: tuple[str, ...] | None = None
    label_studio: tuple[str, str | None] | None = None
    """Label Studio's address, and an access token of it."""
    name: str = ""
    """Its own, by which commands know whose replicas serve."""


class Store:
    """The encodings of all replicas, in a process of its own."""

    def __init__(self) -> None:
        self._cache = _cache_of(ServiceLimits())

    async def bound(self, limits: ServiceLimits) -> None:
        """Set how many encodings are kept, and how long."""
        self._cache.bound(limits.cache_entries, limits.cache_bytes, limits.cache_seconds)

    async def add(self, packed: Encoding) -> str:
        """Keep an encoding whose arrays are numpy's, and return its id."""
        # Arrays that Ray hands over lie in its own store, which is small; a copy is counted and dropped here.
        arrays = {name: np.array(array) for name, array in packed.arrays.items()}
        image = None if packed.image is None else np.array(packed.image)
        return await self._cache.add(replace(packed, arrays=arrays, image=image))

    async def get(self, name: str, known: bool) -> Encoding | bool:
        """Return an encoding, whether there is one if the caller has a copy, and restart its time."""
        encoding = await self._cache.get(name)
        if encoding is None or known:
            return encoding is not None
        return encoding

    async def remove(self, name: str) -> bool:
        """Remove an encoding; return whether there was one."""
        return await self._cache.remove(name)


class SharedEncodings:
    """The encodings of all replicas, as one of them uses them (see `opensan.serve.cache.Encodings`)."""

    def __init__(self, store: Any, limits: ServiceLimits) -> None:
        """`store` is a handle of `Store`."""
        self.seconds = limits.cache_seconds
        self._store = store
        self._copies = _cache_of(limits)

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def size(self) -> int:
        """Bytes of this process's copies."""
        return self._copies.size

    def sweep(self) -> None:
        """Remove expired copies."""
        self._copies.sweep()

    async def add(self, encoding: Encoding) -> str:
        """Keep an encoding and return its id. Raises Problem (503) if the store is being replaced."""
        packed = replace(encoding, arrays={name: _numpy(array) for name, array in encoding.arrays.items()})
        name = await self._ask("add", packed)
        if name is None:
            raise Problem(503, "encodings can't be kept now: try again later", {"Retry-After": "5"})
        return await self._copies.add(encoding, name)

    async def get(self, name: str) -> Encoding | None:
        """Return the encoding of that id; None if there is none (any more)."""
        copy = await self._copies.get(name)
        answer = await self._ask("get", name, copy is not None)
        if not answer:
            await self._copies.remove(name)
            return None
        if copy is None:
            copy = replace(answer, arrays={key: _tensor(array) for key, array in answer.arrays.items()})
            await self._copies.add(copy, name)
        return copy

    async def remove(self, name: str) -> bool:
        """Remove an encoding; return whether there was one."""
        await self._copies.remove(name)
        return bool(await self._ask("remove", name))

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the store's answer; None if it died, and with it what it kept."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        try:
            return await getattr(self._store, method).remote(*arguments)
        except (RayActorError, RayServeException):
            return None


def _cache_of(limits: ServiceLimits) -> EncodingCache:
    return EncodingCache(limits.cache_entries, limits.cache_bytes, limits.cache_seconds)


def _numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()


def _tensor(array: np.ndarray) -> Any:
    """Return a tensor of its own memory: what Ray hands over can't be written, of which torch warns."""
    import torch

    return torch.from_numpy(np.array(array))


class Replica:
    """A model and the application, in a process of their own, of which Ray Serve makes a replica."""

    def __init__(self, deployment: Deployment) -> None:
        """Load the model; a UserError that names the machine ends in the deployment's message."""
        import ray
        from ray import serve

        from opensan.segmenters.load import load

        be_quiet()
        limits = deployment.limits
        try:
            # Clients' words are cached in memory only, where their number is bounded.
            segmenter = load(**deployment.loading, text_cache=False)
        except UserError as error:
            raise UserError(f"the worker on {ray.util.get_node_ip_address()}: {error}") from None
        self._name = deployment.name
        store = serve.get_deployment_handle("store", STORE)
        images = deployment.label_studio and TaskImages(*deployment.label_studio, limits)
        self.application = create_app(
            segmenter,
            limits=limits,
            token=deployment.token,
            batch=deployment.batch,
            hosts=deployment.hosts,
            label_studio=images,
            encodings=SharedEncodings(store, limits),
            all_metrics=self._all_metrics,
        )

    def __serve_build_asgi_app__(self) -> Application:
        """Return the application, which Ray Serve calls for each request."""
        return self.application

    def metrics(self) -> tuple[str, bytes]:
        """Return its id and its page of metrics."""
        from ray import serve

        return serve.get_replica_context().replica_id.unique_id, self.application.service.metrics.page()

    async def _all_metrics(self) -> bytes:
        """Return the metrics of all replicas that answer within some seconds: whoever asks reaches any of them."""
        from ray import serve

        everybody = serve.get_deployment_handle("replica", APPLICATION).broadcast("metrics")
        answers: list[Any] = []
        with suppress(TimeoutError):
            answers = await everybody.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        return merged_pages(dict([self.metrics(), *(each for each in answers if isinstance(each, tuple))]))

    def name(self) -> str:
        """Return its deployment's name."""
        return self._name

    async def close(self) -> None:
        """Refuse new requests, and return when all accepted ones are answered."""
        gate = self.application.gate
        gate.closing = True
        while not gate.empty():
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Raise RuntimeError if nothing is finished any more: Ray Serve then replaces the replica."""
        if self.application.service.engine.hangs:
            raise RuntimeError("nothing was finished within the time limit")


def check_serve() -> None:
    """Raise UserError, one line, if Ray Serve is not installed."""
    if find_spec("ray") is None or find_spec("aiohttp") is None:
        what = "Ray" if find_spec("ray") is None else "Ray Serve"
        raise UserError(f"serve --on ray needs {what}, which is not installed: {install('ray-serve,serve')}")


def application_of(deployment: Deployment) -> Any:
    """Return Ray Serve's application of replicas."""
    from ray import serve

    replica: Any = serve.deployment(
        name="replica",
        num_replicas=deployment.replicas,
        # More wait in Ray Serve's proxy, where no limit of the service holds: all come to the gate, which refuses.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": deployment.cpus, "num_gpus": deployment.gpus},
        max_constructor_retry_count=_STARTS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_drain(deployment),
        max_surge_percent=100,  # new replicas are ready before old ones stop
        rolling_update_percentage=1.0,
        logging_config=_QUIET,
    )(serve.ingress()(Replica))
    return replica.bind(deployment)


def _store() -> Any:
    """Return Ray Serve's application of the store."""
    from ray import serve

    options = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}, "logging_config": _QUIET}
    store: Any = serve.deployment(name="store", **options)(Store)
    return store.bind()


def _drain(deployment: Deployment) -> float:
    """Seconds in which all accepted requests are answered."""
    return deployment.limits.queue_seconds + deployment.limits.client_seconds


def run_on_ray(
    deployment: Deployment,
    host: str,
    port: int,
    *,
    local: bool,
    started: Callable[[str], None],
    note: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, finish accepted requests, and return the signal's number. Use within `cluster`.

    SIGHUP loads the model's file anew and replaces the replicas, one after the other, without dropping requests.

    Args:
        deployment: what the replicas are made of.
        host: address at which the proxies listen.
        port: its port.
        local: whether the cluster ends with this process.
        started: is told the service's URL once it answers.
        note: gets messages, one line each.

    Raises:
        UserError: no replica can start, or something else answers at the address.
    """
    import logging

    from ray import serve
    from ray.serve.config import ProxyLocation

    with _signals() as signals:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        where = ProxyLocation.HeadOnly if local else ProxyLocation.EveryNode
        serve.start(proxy_location=where, http_options={"host": host, "port": port}, logging_config=_QUIET)
        name = _deploy(deployment, signals, note)
        if name is not None:
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            _check_answer(url, host, port)
            started(url)
        while not signals.ended:
            signals.wait()
            if signals.again and not signals.ended:
                signals.again = False
                note("loading the model anew")
                try:
                    name = _deploy(deployment, signals, note) or name
                    note("the model was loaded anew")
                except UserError as error:
                    note(f"{error}: the workers keep the model that they have")
        if name is not None:
            _stop(name, deployment, local, note)
        return signals.number


def _stop(name: str, deployment: Deployment, local: bool, note: Callable[[str], None]) -> None:
    """Let the replicas answer what they accepted, and end them; unless they are another command's by now."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    handle = serve.get_app_handle(APPLICATION)
    seconds = _drain(deployment) + 5
    try:
        if not local and handle.name.remote().result(timeout_s=seconds) != name:
            note("another command has deployed the service since: it is left running")
            return
        handle.broadcast("close").results(timeout_s=seconds)
    except (RayError, RayServeException, TimeoutError) as error:
        note(f"some requests may have no answer ({reason(error)})")
    if not local:
        serve.delete(APPLICATION)
        serve.delete(STORE)


@dataclass
class _Signals:
    """Requests of signals to the main thread."""

    number: int = 0
    ended: bool = False
    again: bool = False
    _came: threading.Event = field(default_factory=threading.Event)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.again = True
        else:
            if self.ended and number == signal.SIGINT:
                raise KeyboardInterrupt  # a second Ctrl-C ends at once
            self.number, self.ended = number, True
        self._came.set()

    def wait(self, seconds: float = 3600.0) -> None:
        """Wait for a signal."""
        self._came.wait(seconds)
        self._came.clear()


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deploy(deployment: Deployment, signals: _Signals, note: Callable[[str], None]) -> str | None:
    """Deploy replicas, and the store if there is none; return the deployment's name once all of them serve.

    Returns None if a signal ended the wait. Raises UserError if replicas can't start.
    """
    from ray import serve

    deployment = replace(deployment, name=secrets.token_hex(8))
    if STORE not in serve.status().applications:
        serve.run(_store(), name=STORE, route_prefix=None)
    serve.get_app_handle(STORE).bound.remote(deployment.limits).result(timeout_s=_PATIENCE)
    target = serve.RunTarget(application_of(deployment), name=APPLICATION)
    serve.run_many([target], wait_for_applications_running=False)
    since, told = time.monotonic(), False
    while not signals.ended:
        status = serve.status().applications[APPLICATION]
        if status.status == "RUNNING":
            return deployment.name
        messages = [status.message, *(each.message for each in status.deployments.values())]
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            said = [line for message in messages for line in _WRONG.findall(message)]
            raise UserError(said[-1] if said else f"no worker could start ({_last_line(messages)})")
        if not told and time.monotonic() - since > _PATIENCE:
            told = True
            note(
                f"waiting for {deployment.replicas} workers of {deployment.cpus:g} CPUs and {deployment.gpus:g} GPUs: "
                "the cluster may be adding machines, or the models are being loaded"
            )
        signals.wait(0.2)
    return None


def _last_line(messages: list[str]) -> str:
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return reason(RuntimeError(lines[-1] if lines else "Ray gives no reason"))


def _check_answer(url: str, host: str, port: int) -> None:
    """Raise UserError if the service does not answer there: the Ray Serve of a cluster has but one address."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    for _ in range(50):
        try:
            urllib.request.urlopen(f"http://{name}:{port}/readyz", timeout=10).close()
            return
        except (OSError, urllib.error.URLError) as error:
            said = reason(error)
            time.sleep(0.2)
    raise UserError(f"the service does not answer at {url} ({said}): does this cluster serve at another port?")
