"""Does a long run over a folder keep its memory, and what does going on with a finished one cost?

    python bench/folder.py [--photographs 2000] [--model tiny] [--formats png,json,coco] [--batch 4] [--folder FOLDER]

Photographs are the bundled scenes, small, some upright, under names of their own. Memory is the process's resident set:
now, and its highest so far. The second run finds everything done: it reads the manifest, looks at every file, and
writes the data sets' common files anew.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import opensan
from opensan.images import list_images
from opensan.jobs.folder import FolderRun, plan
from opensan.vocabulary import Vocabulary

SCENES = Path(opensan.__file__).parent / "assets" / "scenes"
WORDS = "night sky, brick, green heart, orange circle"
SIZE = (200, 150)
ROWS = 10
"""Lines of the table."""


def make(folder: Path, count: int) -> Path:
    """A folder of `count` small photographs, in sub-folders of 500."""
    pictures = [Image.open(path).convert("RGB").resize(SIZE) for path in sorted(SCENES.glob("*.png"))]
    pictures += [picture.transpose(Image.Transpose.ROTATE_90) for picture in pictures]
    for number in range(count):
        path = folder / f"{number // 500:02}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[number % len(pictures)].save(path, quality=80)
    return folder


def resident() -> tuple[float, float]:
    """MiB: now, and the highest so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(segmenter: opensan.SanSegmenter, folder: Path, out: Path, formats: Sequence[str], batch: int) -> None:
    """One run, with a line of the table now and then."""
    began = time.perf_counter()
    jobs = plan(list_images([folder]), [folder])
    with FolderRun(segmenter, Vocabulary.parse(WORDS), jobs, out, formats, batch=batch) as folder_run:
        pending = len(folder_run.pending)
        print(f"{pending} of {len(jobs)} to do")
        for number, _ in enumerate(folder_run.results(), 1):
            if number % max(1, pending // ROWS) == 0:
                now, peak = resident()
                print(f"{number:>8} done {now:>8.0f} MiB {peak:>8.0f} MiB at most", flush=True)
    now, peak = resident()
    seconds = time.perf_counter() - began
    print(
        f"finished {now:>8.0f} MiB {peak:>8.0f} MiB at most, {seconds:.1f} s, {1000 * seconds / len(jobs):.1f} ms each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=2000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--formats", default="png,json,coco")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep photographs and results there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        top = arguments.folder or Path(temporary)
        folder = make(top / "photographs", arguments.photographs)
        segmenter = opensan.load(arguments.model)
        for _ in range(2):
            run(segmenter, folder, top / "out", arguments.formats.split(","), arguments.batch)


if __name__ == "__main__":
    main()
