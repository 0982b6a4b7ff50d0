"""What does the service do at twice its capacity, among clients that misbehave? It is started here, on loopback.

    python bench/load.py [--model tiny] [--seconds 300] [--factor 2] [--json FILE] [--picture FILE] [--on-ray 3]

First the expected label maps are computed in this process, then the capacity is measured (as many clients as the
queue is long, each waiting for its answer), then requests arrive at `factor` times that rate, at random times, whether
or not earlier ones are answered. Meanwhile a person types (words of an encoded photograph, twice a second), and once a
second a client misbehaves: sends half a request and stalls, sends garbage, or leaves while it is served. At the end the
service gets SIGTERM under load. With `--on-ray N` the service is N replicas on Ray: after a third of the time one of
them gets SIGKILL, after half of it the model is loaded anew.
"""

import argparse
import asyncio
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

import opensan
from ray_folder import descendants

SCENES = sorted((Path(__file__).parents[1] / "src" / "opensan" / "assets" / "scenes").glob("*.png"))
WORDS: list[str | dict] = [
    *("night sky|dark sky", "brick|red brick|brick wall", "green heart", "white heart", "orange circle"),
    *("orange cross", "red square|red box", "grass"),
    # Ties: the same prompts under other names. The first of two always wins.
    {"name": "a wall", "prompts": ["a photo of a brick."]},
    {"name": "another wall", "prompts": ["a photo of a brick."]},
    {"name": "lawn", "prompts": ["a photo of a grass.", "grass"]},
    {"name": "meadow", "prompts": ["a photo of a grass.", "grass"]},
]
"""With synonyms, and with ties, which must be decided alike in every batch."""
SIZES = [(640, 480), (480, 640), (640, 427)]
WRONG_SHARE = 0.001
"""Of a label map's pixels: batches may round otherwise than single images, which decides between near equals."""


@dataclass
class Tally:
    """What happened to the requests of one phase."""

    codes: Counter = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    wrong: int = 0
    worst_share: float = 0.0
    lost: list[str] = field(default_factory=list)

    def note(self, code: str, seconds: float) -> None:
        self.codes[code] += 1
        self.seconds.setdefault(code, []).append(seconds)

    def milliseconds(self, code: str) -> dict[str, float]:
        taken = sorted(self.seconds.get(code, []))
        if not taken:
            return {}
        at = {"median": 0.5, "p99": 0.99, "max": 1.0}
        return {
            name: round(1000 * taken[min(len(taken) - 1, int(share * len(taken)))], 1) for name, share in at.items()
        }


@dataclass(frozen=True)
class Sample:
    data: bytes
    """A JPEG file."""
    labels: np.ndarray
    """[H, W] uint8: what the service must answer."""


def samples(model: str) -> list[Sample]:
    """Photographs of several shapes with their label maps, computed without the service."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words that `tiny` does not know
        segmenter = opensan.load(model, text_cache=False, random_weights=None if model == "tiny" else 0)
        made = []
        for scene in SCENES:
            for size in SIZES:
                file = io.BytesIO()
                Image.open(scene).convert("RGB").resize(size).save(file, "JPEG")
                labels = segmenter.segment(file.getvalue(), WORDS).labels
                made.append(Sample(file.getvalue(), labels.astype(np.uint8)))
    return made


class Load:
    """One run against one service."""

    def __init__(self, url: str, made: list[Sample]) -> None:
        self.url = url
        self.samples = made
        self.random = random.Random(0)
        self.client = httpx.AsyncClient(
            base_url=url, timeout=120, limits=httpx.Limits(max_connections=2000, max_keepalive_connections=100)
        )

    async def request(self, tally: Tally) -> None:
        """One photograph; its answer is compared with what is expected."""
        sample = self.random.choice(self.samples)
        form = {"files": {"image": ("photograph.jpg", sample.data)}, "data": {"words": json.dumps(WORDS)}}
        started = time.perf_counter()
        try:
            answer = await self.client.post("/v1/segmentation", headers={"Accept": "image/png"}, **form)
        except httpx.HTTPError as error:
            tally.lost.append(f"{type(error).__name__}: {error}")
            tally.note("lost", time.perf_counter() - started)
            return
        tally.note(str(answer.status_code), time.perf_counter() - started)
        if answer.status_code == 429 and int(answer.headers["Retry-After"]) < 1:
            tally.lost.append("429 without a time to try again")
        if answer.status_code == 200:
            labels = np.asarray(Image.open(io.BytesIO(answer.content)))
            share = float((labels != sample.labels).mean()) if labels.shape == sample.labels.shape else 1.0
            tally.worst_share = max(tally.worst_share, share)
            tally.wrong += share > WRONG_SHARE

    async def capacity(self, clients: int, seconds: float) -> float:
        """Requests answered a second when `clients` wait for their answers."""
        tally, end = Tally(), time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.request(tally)

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        assert set(tally.codes) == {"200"}, tally
        return tally.codes["200"] / (time.monotonic() - started)

    async def fill_cache(self, count: int) -> None:
        """As many encodings as the service keeps."""
        for _ in range(count):
            data = self.samples[0].data
            await self.client.post("/v1/encodings", content=data, headers={"Content-Type": "image/jpeg"})

    async def arrivals(self, rate: float, seconds: float, tally: Tally) -> list[asyncio.Task]:
        """Requests at random times (a Poisson process)."""
        tasks = []
        moment = end = time.monotonic()
        end += seconds
        while (moment := moment + self.random.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, moment - time.monotonic()))
            tasks.append(asyncio.create_task(self.request(tally)))
        return tasks

    async def typing(self, tally: Tally) -> None:
        """A person who asks one photograph ever other words."""
        answer = await self.client.post(
            "/v1/encodings", content=self.samples[0].data, headers={"Content-Type": "image/jpeg"}
        )
        path = f"{answer.json()['id']}/segmentation?format=map"
        for turn in range(1_000_000):
            words = WORDS[: 2 + turn % (len(WORDS) - 2)]
            started = time.perf_counter()
            answer = await self.client.post(f"/v1/encodings/{path}", json={"words": words})
            tally.note(str(answer.status_code), time.perf_counter() - started)
            await asyncio.sleep(0.5)

    async def misbehaving(self, counts: Counter) -> None:
        """Clients that stall, send garbage, or leave; in turns, one a second, and none of them is waited for."""
        tasks = set()
        for turn in range(1_000_000):
            kind = ("stalls", "garbage", "leaves")[turn % 3]
            counts[kind] += 1
            task = asyncio.create_task(self._misbehave(kind))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(1)

    async def _misbehave(self, kind: str) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        head = f"POST /v1/encodings HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\nContent-Length: "
        data = self.samples[0].data
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            if kind == "stalls":
                writer.write(f"{head}{len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
                await reader.read()  # until the service loses its patience
            elif kind == "garbage":
                writer.write(self.random.randbytes(4096))
                await reader.read()
            else:
                writer.write(f"{head}{len(data)}\r\n\r\n".encode() + data)
                await asyncio.sleep(0.02)
            writer.close()
        except ConnectionError:
            pass


def replicas_of(pid: int) -> list[int]:
    """The processes of replicas below a command on Ray."""
    return [child for child, line in descendants(pid).items() if line.startswith("ray::ServeReplica:opensan:replica")]


async def memory(pid: int, series: list[tuple[float, float]], on_ray: bool) -> None:
    """Seconds and resident MiB, once a second; on Ray, of all replicas together."""
    started = time.monotonic()
    while True:
        mib = 0.0
        for each in replicas_of(pid) if on_ray else [pid]:
            with suppress(OSError):
                for line in Path(f"/proc/{each}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        mib += int(line.split()[1]) / 1024
        series.append((round(time.monotonic() - started, 1), mib))
        await asyncio.sleep(1)


async def disturb(service: subprocess.Popen, seconds: float, done: dict[str, float]) -> None:
    """Kill a replica after a third of the time, and have the model loaded anew after half of it."""
    await asyncio.sleep(seconds / 3)
    os.kill(random.Random(0).choice(replicas_of(service.pid)), signal.SIGKILL)
    done["replica killed"] = round(seconds / 3, 1)
    await asyncio.sleep(seconds / 6)
    service.send_signal(signal.SIGHUP)
    done["model loaded anew"] = round(seconds / 2, 1)
    await asyncio.sleep(1e6)


async def run(options: argparse.Namespace, service: subprocess.Popen, url: str, made: list[Sample]) -> dict:
    load = Load(url, made)
    await load.capacity(4, 5)  # warm-up
    await load.fill_cache(64)  # what grows until it is full would look like a leak
    capacity = await load.capacity(options.clients, options.capacity_seconds)
    print(f"capacity {capacity:.1f} requests/s", file=sys.stderr)
    tally, typed, bad, series = Tally(), Tally(), Counter(), []
    others = [
        asyncio.create_task(work)
        for work in (memory(service.pid, series, bool(options.on_ray)), load.typing(typed), load.misbehaving(bad))
    ]
    disturbed: dict[str, float] = {}
    if options.on_ray:
        others.append(asyncio.create_task(disturb(service, options.seconds, disturbed)))
    tasks = await load.arrivals(options.factor * capacity, options.seconds, tally)
    await asyncio.gather(*tasks)
    for other in others:
        assert not other.done(), other
        other.cancel()
    metrics = (await load.client.get("/metrics")).text
    health = (await load.client.get("/readyz")).status_code
    last, stopping = await stop_under_load(load, service, options.factor * capacity)
    minutes = [[mib for at, mib in series if 60 * m <= at < 60 * (m + 1)] for m in range(int(options.seconds // 60))]
    return {
        "model": options.model,
        "seconds": options.seconds,
        "capacity_per_s": round(capacity, 2),
        "offered_per_s": round(len(tasks) / options.seconds, 2),
        "codes": dict(tally.codes),
        "lost": tally.lost[:20],
        "wrong": tally.wrong,
        "worst_share_of_pixels": tally.worst_share,
        "accepted_ms": tally.milliseconds("200"),
        "refused_ms": tally.milliseconds("429"),
        "typing_codes": dict(typed.codes),
        "typing_ms": typed.milliseconds("200"),
        "misbehaving": dict(bad),
        "disturbed_after_s": disturbed,
        "rss_mib_by_minute": [round(statistics.median(minute), 1) for minute in minutes],
        "rss_mib_series": series,
        "ready_after": health,
        "service_errors": [line for line in metrics.splitlines() if 'code="500"' in line],
        "stop": {"codes": dict(last.codes), "lost": last.lost[:5], "wrong": last.wrong, **stopping},
    }


async def stop_under_load(load: Load, service: subprocess.Popen, rate: float) -> tuple[Tally, dict]:
    """SIGTERM among requests. Those that came before it must be answered; later ones are refused, or find nobody."""
    before, after = Tally(), Tally()
    tasks = await load.arrivals(rate, 3, before)
    started = time.monotonic()
    service.send_signal(signal.SIGTERM)
    late = await load.arrivals(rate, 1, after)
    await asyncio.gather(*tasks, *late)
    code = await asyncio.to_thread(service.wait, 120)
    found = {"exit": code, "seconds": round(time.monotonic() - started, 2), "after_signal": dict(after.codes)}
    return before, found


def draw(path: Path, result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    at, mib = zip(*result["rss_mib_series"], strict=True)
    axes.plot(at, mib, color="#0072B2")
    axes.set(xlabel="seconds under load", ylabel="resident memory, MiB", ylim=(0, 1.25 * max(mib)), xlim=(0, max(at)))
    axes.set_title(
        f"{result['offered_per_s']:.1f} requests/s offered, {result['capacity_per_s']:.1f} possible ({result['model']})"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--capacity-seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=8, help="while the capacity is measured")
    parser.add_argument("--factor", type=float, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--on-ray", type=int, metavar="N", help="replicas on Ray, on this machine")
    options = parser.parse_args()
    made = samples(options.model)
    command = [sys.executable, "-m", "opensan", "serve", "--model", options.model, "--port", "0"]
    command += ["--batch", str(options.batch)]
    if options.on_ray:
        command += ["--on", "ray", "--workers", str(options.on_ray)]
    service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = ""
        while not line.startswith("serving"):  # before it, Ray may be waiting for workers
            line = service.stderr.readline()
            assert line, "the service ended"
        url = line.split()[-1]
        result = asyncio.run(run(options, service, url, made))
    finally:
        service.kill()
        messages = service.stderr.read()
    result["service_said"] = messages.splitlines()[-20:]
    if options.picture:
        draw(options.picture, result)
    series = result.pop("rss_mib_series")
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**result, "rss_mib_series": series}))


if __name__ == "__main__":
    main()
