"""The service on Ray: replicas that share encodings, by a stand-in for their store, and by Ray Serve itself."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from opensan.errors import UserError
from opensan.serve import ServiceLimits, create_app
from opensan.serve.limits import Problem
from opensan.serve.metrics import Metrics, merged_pages
from opensan.serve.on_ray import Replica, SharedEncodings, Store

from .test_on_ray import StandIn
from .test_serve import PNG, WORDS, photograph, segmenter, serving  # noqa: F401 (a fixture)

SCENE = next(iter(sorted((Path(__file__).parents[1] / "src" / "opensan" / "assets" / "scenes").glob("*.png"))))


class RayServeException(Exception):
    """Ray Serve's."""


@pytest.fixture
def ray(monkeypatch):
    """The names that replicas import from Ray."""
    stand_in = StandIn()
    serving = types.ModuleType("ray.serve")
    errors = types.ModuleType("ray.serve.exceptions")
    errors.RayServeException = RayServeException  # type: ignore[attr-defined]
    for name, module in (("ray", stand_in), ("ray.serve", serving), ("ray.serve.exceptions", errors)):
        monkeypatch.setitem(sys.modules, name, module)
    failures = types.ModuleType("ray.exceptions")
    vars(failures).update(vars(stand_in.exceptions))
    monkeypatch.setitem(sys.modules, "ray.exceptions", failures)
    return stand_in


class Handle:
    """A handle of a store, as Ray Serve gives it."""

    def __init__(self, store: Store | None) -> None:
        self.store = store

    def __getattr__(self, method: str):
        async def ask(*arguments: object) -> object:
            if self.store is None:
                raise sys.modules["ray.exceptions"].RayActorError("The actor died.")
            return await getattr(self.store, method)(*arguments)

        return types.SimpleNamespace(remote=ask)


def test_every_replica_answers_by_any_id(ray, segmenter):  # noqa: F811
    handle = Handle(Store())
    limits = ServiceLimits()
    with (
        serving(segmenter, encodings=SharedEncodings(handle, limits)) as first,
        serving(segmenter, encodings=SharedEncodings(handle, limits)) as second,
    ):
        name = first.encode()
        answers = [each.ask(name, accept="image/png") for each in (first, second, second)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert second.client.delete(f"/v1/encodings/{name}").status_code == 204
        assert [each.ask(name).status_code for each in (first, second)] == [404, 404]
        handle.store = None
        refused = first.client.post("/v1/encodings", content=photograph(), headers=PNG)
        assert refused.status_code == 503 and "try again later" in refused.json()["detail"]
        assert first.ask(name).status_code == 404


def test_what_was_encoded_by_another_version_of_the_model_is_gone(ray, segmenter):  # noqa: F811
    handle, limits = Handle(Store()), ServiceLimits()
    with serving(segmenter, encodings=SharedEncodings(handle, limits)) as running:
        encoding = segmenter.encode(photograph())
        name = asyncio.run(SharedEncodings(handle, limits).add(replace(encoding, model="older")))
        answer = running.ask(name)
        assert answer.status_code == 404 and "send the image again" in answer.json()["detail"]


def test_the_store_has_the_limits_of_the_service(ray, segmenter):  # noqa: F811
    async def work() -> None:
        store, limits = Store(), ServiceLimits(cache_entries=2)
        await store.bound(limits)
        one, other = (SharedEncodings(Handle(store), limits) for _ in range(2))
        encoding = segmenter.encode(photograph())
        names = [await each.add(encoding) for each in (one, other, one)]
        assert [await one.get(name) is not None for name in names] == [False, True, True]
        again = await one.get(names[1])
        assert again is not None and again.sizes == encoding.sizes and np.array_equal(again.image, encoding.image)
        for key, array in encoding.arrays.items():
            assert torch.equal(again.arrays[key], array)
        assert again is await one.get(names[1]) and len(one) == 2 and one.size == 2 * encoding.nbytes
        with pytest.raises(Problem, match="try again later"):
            await SharedEncodings(Handle(None), limits).add(encoding)

    asyncio.run(work())


def test_metrics_are_those_of_all_replicas():
    pages = {}
    for number, name in enumerate("ab", 1):
        metrics = Metrics()
        metrics.requests.labels("GET", "/v1/info", "200").inc(number)
        metrics.batch.observe(number)
        pages[name] = metrics.page()
    families = {family.name: family for family in text_string_to_metric_families(merged_pages(pages).decode())}
    counted = {
        (sample.labels["replica"], sample.labels["route"]): sample.value
        for sample in families["opensan_requests"].samples
    }
    assert counted == {("a", "/v1/info"): 1, ("b", "/v1/info"): 2}
    sums = [sample for sample in families["opensan_batch_images"].samples if sample.name.endswith("_sum")]
    assert {sample.labels["replica"]: sample.value for sample in sums} == {"a": 1, "b": 2}
    assert families["opensan_batch_images"].type == "histogram"


def test_a_replica_that_closes_answers_what_it_accepted(segmenter):  # noqa: F811
    """Asked without a server: our own would stop when its application closes, and Ray's asks on."""
    replica = Replica.__new__(Replica)
    replica.application = create_app(segmenter)

    async def statuses() -> list[int]:
        gate = replica.application.gate
        async with (
            replica.application.service.running(replica.application),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(replica.application), base_url="http://127.0.0.1"
            ) as client,
        ):
            before = await client.get("/v1/info")
            accepted = asyncio.create_task(client.post("/v1/encodings", content=photograph(), headers=PNG))
            while gate.empty():
                await asyncio.sleep(0)
            closing = asyncio.create_task(replica.close())
            await asyncio.sleep(0)
            refused = await client.get("/v1/info")
            await closing
            assert gate.empty() and accepted.done()
            healthy = await client.get("/healthz")
            replica.check_health()
            return [answer.status_code for answer in (before, await accepted, refused, healthy)]

    assert asyncio.run(statuses()) == [200, 201, 503, 200]


def test_a_worker_without_the_model_is_named(ray, tmp_path):
    from opensan.serve.on_ray import Deployment

    with pytest.raises(UserError, match=r"^the worker on 10\.0\.0\.1: .*nowhere"):
        Replica(Deployment({"source": str(tmp_path / "nowhere"), "device": "cpu"}))


def test_options_and_packages_that_are_missing_are_one_line(run, monkeypatch):
    for options, said in (
        (("--workers", 2), "are for --on ray"),
        (("--workers-per-gpu", 2), "is for --on ray"),
        (("--on", "ray"), "--on ray needs --workers N"),
    ):
        code, _, err = run("serve", "--model", "tiny", *options)
        assert code == 2 and said in err and err.count("\n") == 1, err
    monkeypatch.setattr("opensan.jobs.on_ray.find_spec", lambda name: name)
    monkeypatch.setattr("opensan.serve.on_ray.find_spec", lambda name: name == "ray" or None)
    code, _, err = run("serve", "--model", "tiny", "--on", "ray", "--workers", 1)
    assert code == 1 and err.count("\n") == 1
    assert "serve --on ray needs Ray Serve, which is not installed: pip install '.[ray-serve,serve]'" in err


def ask(client: httpx.Client, name: str) -> httpx.Response:
    words = {"words": WORDS}
    return client.post(f"/v1/encodings/{name}/segmentation", json=words, headers={"Accept": "image/png"})


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None or find_spec("aiohttp") is None,
    reason="Ray Serve is not installed (the extra `ray-serve`)",
)
def test_ray_serve_itself_with_a_replica_that_is_killed(tmp_path):
    """Ids work at each replica and after a death, the model is loaded anew without a refusal, and SIGTERM ends it."""
    from ray_folder import descendants

    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "opensan", "serve", "--model", "tiny", "--device", "cpu", "--port", "0"]
    service = subprocess.Popen([*command, "--on", "ray", "--workers", "2"], stderr=log, stdout=log)
    path = Path(log.name)

    def wait_for(said: str) -> str:
        end = time.monotonic() + 400
        while said not in path.read_text():
            assert service.poll() is None and time.monotonic() < end, path.read_text()
            time.sleep(0.2)
        return path.read_text()

    def replicas() -> list[int]:
        lines = descendants(service.pid).items()
        return [pid for pid, line in lines if line.startswith("ray::ServeReplica:opensan:replica")]

    try:
        url = wait_for("serving").split()[-1]
        with httpx.Client(base_url=url, timeout=120) as client:
            name = client.post("/v1/encodings", content=SCENE.read_bytes(), headers=PNG).json()["id"]
            answers = [ask(client, name) for _ in range(12)]
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.content for answer in answers}) == 1
            labels = np.asarray(Image.open(io.BytesIO(answers[0].content)))
            assert labels.shape == Image.open(SCENE).size[::-1]
            counted = {
                line for line in client.get("/metrics").text.splitlines() if "opensan_batch_images_count" in line
            }
            assert len(counted) == 2, counted  # of both replicas
            os.kill(replicas()[0], signal.SIGKILL)
            assert ask(client, name).status_code in (200, 500)  # the dead one may have it
            assert [ask(client, name).status_code for _ in range(4)] == [200] * 4
            before = set(replicas())
            service.send_signal(signal.SIGHUP)
            while "was loaded anew" not in path.read_text():
                assert ask(client, name).status_code == 200 and service.poll() is None
            assert before.isdisjoint(replicas())
            assert ask(client, name).content == answers[0].content
        service.terminate()
        assert service.wait(120) == 0
        assert not path.read_text().count("Traceback")
    finally:
        service.kill()
