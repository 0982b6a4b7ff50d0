"""What is lost when the service is killed under load? It is started here, on loopback, always at the same port.

    python bench/kill.py [--model tiny] [--rounds 10] [--json FILE]

In each round clients send photographs without pause; after a random time the service gets SIGKILL, or every other
time SIGTERM, and is started again. Told are what requests from before and from after the signal got, the answers that
were wrong, the files that were left behind, and how soon the next service was ready.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from load import Load, Tally, samples

CLIENTS = 12


def start(model: str, port: int, folder: Path) -> tuple[subprocess.Popen, str, float]:
    """The service, its URL, and after how many seconds it answers; whatever it writes goes to `folder`."""
    places = {name: str(folder) for name in ("TMPDIR", "OPENSAN_CACHE", "HOME", "XDG_CACHE_HOME")}
    started = time.monotonic()
    service = subprocess.Popen(
        [sys.executable, "-m", "opensan", "serve", "--model", model, "--port", str(port)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **places},
    )  # fmt: skip
    said = service.stderr.readline()
    assert said.startswith("serving"), said
    return service, said.split()[-1], time.monotonic() - started


async def one_round(load: Load, service: subprocess.Popen, number: signal.Signals, seconds: float) -> list[Tally]:
    """Clients send until the service is gone; the answers to requests of before and of after the signal."""
    tallies = [Tally(), Tally()]
    end = time.monotonic() + seconds

    async def client() -> None:
        while service.poll() is None:
            await load.request(tallies[time.monotonic() > end])
            await asyncio.sleep(0.05)

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(end - time.monotonic())
    service.send_signal(number)
    await asyncio.to_thread(service.wait, 60)
    await asyncio.gather(*clients)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made, chance, port = samples(options.model), random.Random(0), 0
    found: dict[str, Counter] = {"SIGKILL": Counter(), "SIGTERM": Counter()}
    ready: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.rounds):
            number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
            service, url, seconds = start(options.model, port, Path(name))
            try:
                port = int(url.rpartition(":")[2])
                ready.append(seconds)
                load = Load(url, made)
                tallies = asyncio.run(one_round(load, service, number, chance.uniform(2, 8)))
                counts = found[number.name]
                counts.update(["rounds", f"exit {service.returncode}"])
                for when, tally in zip(("before", "after"), tallies, strict=True):
                    counts.update({f"{when}: {code}": count for code, count in tally.codes.items()})
                    counts["wrong"] += tally.wrong
            finally:
                service.kill()
        left = sorted(str(path.relative_to(name)) for path in Path(name).rglob("*"))
    result = {
        **{name: dict(counts) for name, counts in found.items()},
        "files_left": left,
        "seconds_until_ready": {"median": round(statistics.median(ready), 1), "slowest": round(max(ready), 1)},
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
