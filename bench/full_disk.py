"""What is lost when the disk is full? Each command that writes files meets a full disk after so many bytes.

    sudo mount -t tmpfs -o size=200m tmpfs /mnt/small
    python bench/full_disk.py /mnt/small [--times 40] [--jobs folder,train,eval,video,raster] [--json FILE]

FOLDER is an empty file system of some MB. A command runs once with room for everything. Then, again and again, all but
some bytes are filled before it starts. It must end with exit code 0, or with 1 and one line that names a path; what it
leaves behind must not be temporary. Then there is room again: the same command must come to the files of the
undisturbed run, and to nothing else. The jobs and what must be equal are those of `bench/kill_jobs.py`.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from kill_jobs import commands, contents, make_inputs

FILLER = "filler"
TEMPORARY = re.compile(r"\..*\.[a-z0-9_]{8}\.part(\..*)?")
"""Names of temporary files. `.clip.part` is none: it holds what is done of a video or raster."""


def work(arguments: list[str], errors: Path) -> None:
    """In a process of its own: run a command, with its messages in a file."""
    from opensan.cli import main

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    main(arguments)


def fill(folder: Path, room: int) -> None:
    """Leave about `room` bytes free on the file system."""
    free = shutil.disk_usage(folder).free
    with (folder / FILLER).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - room))


def fault(code: int | None, said: str, out: Path) -> str | None:
    """What is wrong with the end of a command on a full disk; None if nothing."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if code not in (0, 1) or "Traceback" in said:
        return f"exit code {code}: {said[-300:]}"
    if code == 1 and (len(errors) != 1 or str(out) not in errors[0]):
        return f"names no path: {said[-300:]}"
    left = [path.name for path in out.rglob("*.part*") if TEMPORARY.fullmatch(path.name)]
    return f"left {left}" if left else None


def fill_again_and_again(arguments: list[str], out: Path, times: int, run: Callable) -> dict[str, object]:
    """Run a command on a disk with more and more room; what was seen."""
    assert run(arguments)[0] == 0, arguments
    whole = contents(out)
    size = sum(path.stat().st_blocks * 512 for path in out.rglob("*"))
    shutil.rmtree(out)
    done: dict[str, object] = {"times": times, "ended_with_1": 0, "faults": [], "differ": []}
    for number in range(times):
        fill(out.parent, round(1.5 * size * number / times))
        code, said = run(arguments)
        done["ended_with_1"] += code == 1
        if wrong := fault(code, said, out):
            done["faults"].append(wrong)
        (out.parent / FILLER).unlink()
        code, said = run(arguments)
        now = contents(out)
        different = sorted(name for name in {*whole, *now} if now.get(name) != whole.get(name))
        if code or different:
            done["differ"].append([number, code, different[:5], said[-300:] if code else ""])
        shutil.rmtree(out)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--jobs", default="folder,train,eval,video,raster")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(options.folder.iterdir()) or shutil.disk_usage(options.folder).total > 300 << 20:
        raise SystemExit(f"{options.folder}: not an empty file system of at most 300 MB")
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread is forked
    context.set_forkserver_preload(["opensan.segmenters.san", "opensan.jobs.video", "opensan.recipe.run"])
    result = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        os.environ["OPENSAN_CACHE"] = str(top / "cache")
        make_inputs(top)

        def run(arguments: list[str]) -> tuple[int | None, str]:
            process = context.Process(target=work, args=(arguments, top / "errors"))
            process.start()
            process.join()
            return process.exitcode, (top / "errors").read_text(errors="replace")

        for job, arguments in commands(top, options.folder / "out").items():
            if job in options.jobs.split(","):
                result[job] = fill_again_and_again(arguments, options.folder / "out", options.times, run)
                print(job, json.dumps(result[job]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
