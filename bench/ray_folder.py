"""Does Ray cost speed, and what is lost when workers or the driver are killed? For `opensan segment --on ray`.

    python bench/ray_folder.py [--images 300] [--workers 3] [--kills 20] [--minutes 12] [--only speed,worker,driver]

speed: a folder is labelled by turns in this process and by workers on this machine, which are there already; CPU
seconds are those of all processes. worker: while a command labels the folder, its workers get SIGKILL, one at a time,
as soon as the ledger has grown. driver: the command gets SIGKILL at random moments after its first results, and is
started again. At the end each image must have its files, equal to those of an undisturbed run in one process, and one
row of the ledger. files: CPU seconds to read a JPEG of 640x640 and to write its results, and their bytes.
"""

import argparse
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

import opensan
from opensan.images import list_images
from opensan.jobs.folder import FolderRun, Question, Written, plan
from opensan.jobs.on_ray import RayRun, Workers, cluster
from opensan.lab.scenes import make_scene

WORDS = "sand, snow, grass, water"
FORMATS = ("png", "json")
TICKS = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> dict[int, str]:
    """The processes below `pid`, and their command lines."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            parents[int(entry.name)] = int(stat[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: lines[child] for child in found - {pid}}


def workers_of(pid: int) -> list[int]:
    return [child for child, line in descendants(pid).items() if line.startswith("ray::Worker")]


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(stat[11]) + int(stat[12])
    return total / TICKS


def records(out: Path) -> list[str]:
    if not (out / "manifest.sqlite").exists():
        return []
    with closing(sqlite3.connect(out / "manifest.sqlite", timeout=60)) as rows:
        if not rows.execute("SELECT name FROM sqlite_schema").fetchall():
            return []
        return [key for (key,) in rows.execute("SELECT key FROM done WHERE key GLOB 'image *'")]


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and "manifest" not in path.name)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def measure_speed(folder: Path, top: Path, workers: int, rounds: int) -> None:
    vocabulary = opensan.Vocabulary.parse(WORDS)
    jobs = plan(list_images([folder]), [folder])
    segmenter = opensan.load("tiny", device="cpu")
    segmenter.prepare_words(vocabulary)
    out = top / "speed"
    question = Question(vocabulary, out, FORMATS)
    with cluster(None, workers):
        hired = Workers(workers, {"source": "tiny", "device": "cpu"}, question, note=print)
        for _ in range(rounds):
            for kind in ("one process", f"{workers} workers"):
                shutil.rmtree(out, ignore_errors=True)
                if kind == "one process":
                    run = FolderRun(segmenter, vocabulary, jobs, out, FORMATS)
                else:
                    run = RayRun(hired, jobs)
                    while len(hired._ready) < workers:  # all of them are to be there before the clock starts
                        for ref in hired._wait(list(hired._starting)):
                            hired._started(ref)
                pids = [os.getpid(), *workers_of(os.getpid())]
                with run:
                    began, cpu = time.monotonic(), cpu_seconds(pids)
                    done = sum(isinstance(result, Written) for result in run.results())
                    seconds, cpu = time.monotonic() - began, cpu_seconds(pids) - cpu
                assert done == len(jobs)
                rate, cost = done / seconds, 1000 * cpu / done
                load = os.getloadavg()[0]
                print(
                    f"{kind}: {done} images, {rate:.2f} images/s, {cost:.0f} ms of CPU each, load {load:.1f}",
                    flush=True,
                )


def measure_files(top: Path, count: int = 12) -> None:
    """Medians over drawn images; noise of a camera would make JPEGs larger, and label maps too."""
    segmenter = opensan.load("tiny", device="cpu")
    seconds: dict[str, list[float]] = {"read": [], **{name: [] for name in (*FORMATS, "overlay")}}
    sizes: dict[str, list[int]] = {name: [] for name in seconds}
    for number in range(count):
        image = top / f"{number}.jpg"
        Image.fromarray(make_scene(3, number, (640, 640), split="test").image).save(image, quality=90)
        began = time.process_time()
        read = segmenter.read(image)
        seconds["read"].append(time.process_time() - began)
        sizes["read"].append(image.stat().st_size)
        (encoding,) = segmenter.encode_read([read])
        segmentation = segmenter.segment(encoding, WORDS)
        for name in (*FORMATS, "overlay"):
            began = time.process_time()
            (path,) = segmentation.save(top / "files", f"{number}", [name]).values()
            seconds[name].append(time.process_time() - began)
            sizes[name].append(path.stat().st_size)
    for name, values in seconds.items():
        cost, size = 1000 * statistics.median(values[2:]), statistics.median(sizes[name])
        print(f"files: {name}: {cost:.0f} ms of CPU, {size / 1000:.0f} kB", flush=True)


def start(folder: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "opensan", "segment", str(folder), "--words", WORDS, "--model", "tiny"]
    options = ["--out", str(out), "--format", ",".join(FORMATS), "--json", "--device", "cpu"]
    with out.with_suffix(".jsonl").open("a") as file:
        return subprocess.Popen([*command, *options, "--on", "ray", "--workers", str(workers)], stdout=file)


def printed(out: Path) -> list[str]:
    """The lines of all commands that wrote to `out`."""
    return out.with_suffix(".jsonl").read_text().splitlines()


def check(name: str, out: Path, whole: dict[str, bytes], count: int, kills: int, seconds: float) -> None:
    rows, found = records(out), contents(out)
    left = [path for path in found if ".part" in path or ".lock" in path or ".changed" in path]
    differ = [path for path, content in whole.items() if found.get(path) != content]
    print(
        f"{name}: {kills} kills in {seconds:.0f} s; rows of the ledger {len(rows)} of {count}, twice "
        f"{len(rows) - len(set(rows))}; files that differ or are missing {len(differ)}, left behind {len(left)}, "
        f"others {len(found.keys() - whole.keys() - set(left))}",
        flush=True,
    )


def kill_workers(folder: Path, out: Path, whole: dict[str, bytes], count: int, args: argparse.Namespace) -> None:
    began, kills, before, chance = time.monotonic(), 0, 0, random.Random(0)
    process = start(folder, out, args.workers)
    while process.poll() is None:
        time.sleep(0.05)
        late = time.monotonic() - began > 60 * args.minutes
        if kills < args.kills and not late and (now := len(records(out))) > before:
            time.sleep(chance.uniform(0, 0.3))
            if pids := workers_of(process.pid):
                os.kill(chance.choice(pids), signal.SIGKILL)
                kills, before = kills + 1, now
    told = printed(out)
    twice = len(told) - len(set(told))
    print(f"worker: exit code {process.returncode}, lines of results {len(told)}, of them twice {twice}")
    check("worker", out, whole, count, kills, time.monotonic() - began)


def kill_drivers(folder: Path, out: Path, whole: dict[str, bytes], count: int, args: argparse.Namespace) -> None:
    began, kills, chance = time.monotonic(), 0, random.Random(1)
    while True:
        process = start(folder, out, args.workers)
        before = len(records(out))
        last = kills == args.kills or time.monotonic() - began > 60 * args.minutes
        enough = count + 1 if last else min(before + chance.randint(0, 3), count - 1)
        while process.poll() is None and not (len(records(out)) > enough):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2))
        if process.poll() is None:
            process.kill()
            kills += 1
        if process.wait() == 0:
            break
        assert process.returncode == -9, process.returncode
    told = printed(out)
    print(f"driver: of {len(told)} lines of results {len(told) - len(set(told))} came twice")
    check("driver", out, whole, count, kills, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="speed,worker,driver,files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        folder = top / "in"
        folder.mkdir()
        for number in range(args.images):
            Image.fromarray(make_scene(3, number, (120, 160), split="test").image).save(folder / f"{number:04}.png")
        vocabulary = opensan.Vocabulary.parse(WORDS)
        jobs = plan(list_images([folder]), [folder])
        wanted = args.only.split(",")
        if "files" in wanted:
            measure_files(top)
        if wanted == ["files"]:
            return
        with FolderRun(opensan.load("tiny", device="cpu"), vocabulary, jobs, top / "whole", FORMATS) as run:
            assert sum(isinstance(result, Written) for result in run.results()) == args.images
        whole = contents(top / "whole")
        if "worker" in wanted:
            kill_workers(folder, top / "killed-workers", whole, args.images, args)
        if "driver" in wanted:
            kill_drivers(folder, top / "killed-drivers", whole, args.images, args)
        if "speed" in wanted:
            measure_speed(folder, top, args.workers, args.rounds)


if __name__ == "__main__":
    main()
