"""Follow docs/tasks.md as a newcomer would, every command a process of its own, and count commands and seconds.

    python bench/tasks.py [--write] [--desk FOLDER]

`--write` puts the table into the page. Needs the extras `serve`, `onnx` and `video`, and curl.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.files import ASSETS, write_text
from opensan.lab.films import make_film
from opensan.lab.scenes import label_map, make_scene

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
NAMES = ("sand", "grass", "night sky", "star", "moon", "circle")


def lay_out(desk: Path) -> None:
    """Make the files that the page names: scenes, a video, and ten labelled images."""
    desk.mkdir(parents=True, exist_ok=True)
    with Image.open(ASSETS / "scenes" / "court.png") as scene:
        scene.convert("RGB").resize((320, 240)).save(desk / "court.png")
    for folder in ("photos", "mine/images", "mine/labels"):
        (desk / folder).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.fromarray(make_scene(7, number, (240, 320)).image).save(desk / "photos" / f"{number}.png")
    for number in range(10):
        scene = make_scene(8, number, (240, 320), split="masks")
        Image.fromarray(scene.image).save(desk / "mine" / "images" / f"{number}.png")
        labels = label_map(scene, NAMES).astype(np.uint8)  # -1 becomes 255, which is unlabelled
        Image.fromarray(labels).save(desk / "mine" / "labels" / f"{number}.png")
    write_text(desk / "mine" / "classes.txt", "\n".join(NAMES) + "\n")
    write_video(desk / "street.mp4", [frame.scene.image for frame in make_film(1, 0, 10, (120, 160))])


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write frames [H, W, 3] uint8 as an MP4 of 25 a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 25)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def tasks(page: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield each task's title, and its blocks: language, file to write or "", text."""
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        yield title, re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)


def commands(of_task: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return the commands among a task's blocks, each with its language; lines of Python are one command."""
    texts = [(language, text) for language, file, text in of_task if not file and language in ("sh", "python")]
    return [
        (language, line)
        for language, text in texts
        for line in ([text] if language == "python" else text.replace("\\\n", "").splitlines())
    ]


class Newcomer:
    """Does what a task's blocks say, in a folder; counts commands and the seconds until each has answered."""

    def __init__(self, desk: Path) -> None:
        self.desk = desk
        binaries = Path(sys.executable).parent
        self.environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        self.services: list[subprocess.Popen] = []
        self.address = ""

    def follow(self, blocks: list[tuple[str, str, str]]) -> tuple[int, float, float]:
        """Return the number of commands, their seconds, and the processor seconds of all they started."""
        for _, file, text in blocks:
            if file:
                (self.desk / file).write_text(text, encoding="utf-8")
        start, busy = time.monotonic(), processor_seconds()
        lines = commands(blocks)
        for language, line in lines:
            self.run(language, line)
        seconds = time.monotonic() - start
        self.stop()
        return len(lines), seconds, processor_seconds() - busy

    def run(self, language: str, text: str) -> None:
        """Run a command to its end, or a service until it says its address."""
        words = [sys.executable, "-c", text] if language == "python" else shlex.split(text)
        if words[0] == "opensan":
            words = [sys.executable, "-m", "opensan", *(word for word in words[1:] if word != "--show")]
        if words[3:4] in (["serve"], ["ui"]):
            self.start(words)
            return
        words = [re.sub(r"http://localhost:\d+", self.address, word) for word in words]
        done = subprocess.run(words, cwd=self.desk, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{text}\n{done.stdout}{done.stderr}")

    def start(self, words: list[str]) -> None:
        """Start a service at a free port, and wait until it answers."""
        words = [*words, "--port", "0", *(["--no-open"] if words[3] == "ui" else [])]
        options = {"cwd": self.desk, "env": self.environment, "text": True}
        service = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        self.services.append(service)
        line = service.stdout.readline() if service.stdout else ""
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit(f"{words}: {line}")
        self.address = address[0].rstrip("/")

    def stop(self) -> None:
        """End the services."""
        while self.services:
            service = self.services.pop()
            service.terminate()
            service.wait(60)
            if service.stdout:
                service.stdout.close()


def processor_seconds() -> float:
    """Return the processor time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """Give the folder that was asked for, or a temporary one."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def anchor(title: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/tasks.md")
    parser.add_argument("--desk", type=Path, help="the folder to work in; it is kept")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    lines = ["| task | commands | seconds | of a processor |", "|---|---|---|---|"]
    with folder(arguments.desk) as desk:
        lay_out(desk)
        newcomer = Newcomer(desk)
        try:
            for title, blocks in tasks(page):
                count, seconds, busy = newcomer.follow(blocks)
                lines.append(f"| [{title}](#{anchor(title)}) | {count} | {seconds:.1f} | {busy:.1f} |")
                print(lines[-1], flush=True)
        finally:
            newcomer.stop()
    if arguments.write:
        before, _, after = page.partition(lines[0])
        write_text(PAGE, before + "\n".join(lines) + after[after.index("\n\n") :])


if __name__ == "__main__":
    main()
