"""What is lost when the commands that write files are killed? Each is killed at random moments, again and again.

    python bench/kill_jobs.py [--kills 100] [--minutes 10] [--jobs folder,train,eval,video,raster] [--json FILE]

A command runs once undisturbed. Then it is started, gets SIGKILL after a random time, and is started again, until it
comes to its end: its files must be those of the undisturbed run, and nothing else. That is repeated from an empty
folder until there were so many kills, or so many minutes are over. Commands run with one thread, so that sums are taken
in the same order and files are equal to the byte. Of overlay videos, whose encoder does not repeat itself, the frames'
times are compared; of checkpoints the numbers in them; of logs all but the columns that measure time and memory.
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opensan.lab.films import make_film
from opensan.lab.scenes import make_scene

WORDS = "sand, snow, grass, water"
MEASURED = ("samples_per_second", "waiting_for_data", "peak_memory_mib")
RECIPE = """start: {{model: tiny, weights: model}}
data: [{{folder: {set}}}]
validation: {{folder: {set}, split: val, limit: 2, pictures: 1}}
loop: {{steps: 8, batch_size: 1, learning_rate: 0.001, save_every: 2, keep: 2, log_every: 1, validate_every: 4}}
augment: {{short_sides: [96], crop: [96, 96]}}
points: {{count: 64}}
device: cpu
out: {out}
"""


def make_inputs(top: Path) -> None:
    """Drawn images, a labelled set, a video and a raster."""
    for name in ("in", "set/images", "set/labels"):
        (top / name).mkdir(parents=True)
    for number in range(12):
        image = make_scene(3, number, (96, 128), split="test").image
        Image.fromarray(image).save(top / "in" / f"{number}.png")
        if number < 6:
            Image.fromarray(image).save(top / "set" / "images" / f"{number}.png")
            Image.fromarray((image.mean(axis=2) // 86).astype(np.uint8)).save(top / "set" / "labels" / f"{number}.png")
    (top / "set" / "classes.txt").write_text("sky\ngrass\nbrick\n")
    (top / "set" / "train.txt").write_text("0\n1\n2\n3\n")
    (top / "set" / "val.txt").write_text("4\n5\n")
    Image.fromarray(make_scene(3, 1, (300, 400), split="test").image).save(top / "raster.png")
    frames = [Image.fromarray(frame.scene.image) for frame in make_film(1, 0, 20, (48, 66))]
    frames[0].save(top / "clip.gif", save_all=True, append_images=frames[1:], duration=40)


def commands(top: Path, out: Path) -> dict[str, list[str]]:
    """Each job's command line, writing to `out`."""
    (top / "recipe.yaml").write_text(RECIPE.format(set=top / "set", out=out))
    asked = ["--words", WORDS, "--model", "tiny", "--out", str(out)]
    formats = ["--format", "png,overlay,json,coco,yolo,voc,labelstudio"]
    data = ["--data", str(top / "set"), "--model", "tiny", "--split", "val", "--save-predictions", "--out", str(out)]
    return {
        "folder": ["segment", str(top / "in"), *asked, *formats],
        "train": ["train", str(top / "recipe.yaml")],
        "eval": ["eval", *data],
        "video": ["segment-video", str(top / "clip.gif"), *asked],
        "raster": ["segment-raster", str(top / "raster.png"), *asked, "--tile", "128"],
    }


def work(arguments: list[str]) -> None:
    """In a process that may be killed: run a command without a word."""
    from opensan.cli import main

    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    main(arguments)


def content(path: Path) -> object:
    """What must be equal in two runs of a command."""
    if path.suffix == ".mp4":
        from opensan.jobs.video import VideoReader

        with VideoReader(path) as clip:
            return [frame.pts for frame in clip.frames()]
    if path.name == "log.csv":
        with path.open(newline="") as file:
            return [{name: one for name, one in row.items() if name not in MEASURED} for row in csv.DictReader(file)]
    if path.suffix == ".pt":
        return plain(torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".sqlite":  # a ledger's rows are written in any order, with the times of files
        with closing(sqlite3.connect(path)) as rows:
            return sorted(key for (key,) in rows.execute("SELECT key FROM done"))
    return path.read_bytes()


def plain(state: object) -> object:
    """A checkpoint's numbers; the order of its parts and what they share is not of interest."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else state


def contents(out: Path) -> dict[str, object]:
    """All files of a run, but for pictures of measured times; paths in files name the folder alone."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "curves.png"]
    return {re.sub(r"-[0-9a-f]{16}\.pt", ".pt", path.relative_to(out).as_posix()): content(path) for path in files}


def kill_again_and_again(
    arguments: list[str], out: Path, kills: int, minutes: float, run: Callable
) -> dict[str, object]:
    """Kill a command so many times; what was found."""
    run(arguments).join()  # fills caches and the time it takes
    shutil.rmtree(out)
    started = time.monotonic()
    process = run(arguments)
    process.join()
    assert process.exitcode == 0, arguments
    takes, whole = time.monotonic() - started, contents(out)
    shutil.rmtree(out)
    chance, done = random.Random(0), {"kills": 0, "completed": 0, "differ": 0, "left_behind": 0, "failed": 0}
    at_once, end = 0, time.monotonic() + 60 * minutes

    def enough() -> bool:
        return done["kills"] >= kills or time.monotonic() > end

    while not enough() or at_once:
        process = run(arguments)
        limit = None if at_once >= 12 or enough() else chance.uniform(0, 1.1 * takes)
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            done["kills"] += 1
            at_once += 1
            continue
        done["failed"] += process.exitcode != 0
        found = contents(out)
        surplus = sorted(found.keys() - whole.keys())
        different = sorted(name for name in whole if found.get(name) != whole[name])
        done["completed"] += 1
        done["left_behind"] += bool(surplus)
        done["differ"] += bool(different)
        if surplus or different:
            done.setdefault("first", {"surplus": surplus[:5], "different": different[:5]})
        shutil.rmtree(out)
        at_once = 0
    return {**done, "seconds_undisturbed": round(takes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10, help="For each job.")
    parser.add_argument("--jobs", default="folder,train,eval,video,raster")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread is forked
    context.set_forkserver_preload(
        [
            "opensan.segmenters.san",
            "opensan.cli.segment",
            "opensan.jobs.folder",
            "opensan.jobs.video",
            "opensan.recipe.run",
        ]
    )

    def run(arguments: list[str]) -> multiprocessing.Process:
        process = context.Process(target=work, args=(arguments,))
        process.start()
        return process

    result = {}
    with tempfile.TemporaryDirectory() as name:
        top, out = Path(name), Path(name) / "out"
        os.environ["OPENSAN_CACHE"] = str(top / "cache")
        make_inputs(top)
        for job, arguments in commands(top, out).items():
            if job in options.jobs.split(","):
                result[job] = kill_again_and_again(arguments, out, options.kills, options.minutes, run)
                print(job, json.dumps(result[job]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
