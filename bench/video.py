"""Videos: what steadying gains and costs, and whether memory stays the same however long a clip is.

    python bench/video.py steady [--films 5] [--frames 24]
    python bench/video.py long [--frames 3000] [--size 240x320]

`steady` labels drawn films, in which the camera pans and zooms and objects move, and of which it is known where each
point was in the frame before. Flicker is the share of points seen in two frames in a row that change their word between
them. `long` labels a clip with the packaged model, as the command does, and tells the process's resident memory and the
frames a second.
"""

import argparse
import resource
import tempfile
import time
from fractions import Fraction
from itertools import chain, islice, repeat
from pathlib import Path

import av
import numpy as np

import opensan
from opensan.jobs.video import VideoRun
from opensan.jobs.video.steady import Steadier
from opensan.lab.films import make_film
from opensan.lab.scenes import SEGMENTATION_NAMES, label_map
from opensan.vocabulary import Vocabulary

WORDS = list(dict.fromkeys(name.split()[-1] for name in SEGMENTATION_NAMES))
"""Shapes and grounds, without colours."""
WORD = np.array([WORDS.index(name.split()[-1]) for name in SEGMENTATION_NAMES])
SPEEDS = (0.006, 0.02)
"""How far the camera and each object move from frame to frame, at most, as shares of the frame's short side."""
ROWS = 10
"""Lines of the table of memory."""


class Score:
    """What is counted over several films."""

    def __init__(self) -> None:
        self.confusion = np.zeros((len(WORDS), len(WORDS)), dtype=np.int64)
        self.changed = self.seen = 0
        self.before: np.ndarray | None = None

    def add(self, labels: np.ndarray, truth: np.ndarray, before: np.ndarray) -> None:
        counts = np.bincount((truth * len(WORDS) + labels).ravel(), minlength=self.confusion.size)
        self.confusion += counts.reshape(self.confusion.shape)
        seen = before[..., 0] >= 0
        if self.before is not None and seen.any():
            row, column = before[seen].T
            self.changed += int((labels[seen] != self.before[row, column]).sum())
            self.seen += int(seen.sum())
        self.before = labels

    def __str__(self) -> str:
        right, true, said = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        iou = right[true > 0] / (true + said - right)[true > 0]
        return (
            f"mIoU {iou.mean():.3f}  right pixels {right.sum() / true.sum():.3f}  "
            f"flicker {self.changed / self.seen:.2%}"
        )


def steady(films: int, frames: int, model: str) -> None:
    segmenter = opensan.load(model)
    words = Vocabulary.parse(WORDS)
    for speed in SPEEDS:
        scores, took = {"off": Score(), "on": Score()}, []
        for index in range(films):
            steadier = Steadier()
            for frame in make_film(11, index, frames, speed=speed):
                read = segmenter.read(frame.scene.image)
                encoding = segmenter.encode_read([read])[0]
                start = time.perf_counter()
                steadied = steadier.steadied(encoding, read.prepared.pixels)
                took.append(1000 * (time.perf_counter() - start))
                for which, one in (("off", encoding), ("on", steadied)):
                    labels = segmenter.segment(one, words).labels
                    scores[which].add(labels, WORD[label_map(frame.scene)], frame.before)
        for which, score in scores.items():
            print(f"speed {speed}  steadying {which:<3}  {score}", flush=True)
        print(f"speed {speed}  steadying takes {np.median(took):.0f} ms a frame (median)", flush=True)


def write_clip(path: Path, frames: int, size: tuple[int, int]) -> None:
    """A drawn film, there and back again until there are so many frames."""
    film = [frame.scene.image for frame in make_film(5, 0, 50, size)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(islice(chain.from_iterable(repeat(film + film[::-1])), frames)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def resident() -> tuple[float, float]:
    """MiB: now, and the highest so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def long(frames: int, size: tuple[int, int], model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "long.mp4"
        write_clip(clip, frames, size)
        print(f"clip: {frames} frames of {size[1]} x {size[0]}, {clip.stat().st_size / 1e6:.1f} MB", flush=True)
        segmenter = opensan.load(model)
        began = time.perf_counter()
        with VideoRun(segmenter, Vocabulary.parse(WORDS), clip, Path(folder) / "out") as run:
            for number, _ in enumerate(run.results(), 1):
                if number % max(1, frames // ROWS) == 0:
                    now, peak = resident()
                    speed = number / (time.perf_counter() - began)
                    print(f"{number:>8} {now:>8.0f} MiB {peak:>8.0f} MiB at most {speed:>8.1f} frames/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steady", "long"])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--films", type=int, default=5)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", default="240x320", help="height and width of the long clip's frames")
    arguments = parser.parse_args()
    if arguments.what == "steady":
        steady(arguments.films, arguments.frames or 24, arguments.model)
    else:
        height, width = (int(side) for side in arguments.size.split("x"))
        long(arguments.frames or 3000, (height, width), arguments.model)


if __name__ == "__main__":
    main()
