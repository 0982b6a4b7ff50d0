"""Kill a process that adds to, removes from and compacts an index, many times, and compare what is left in the end.

    python bench/index_kills.py --kills 50

Each round changes, adds or deletes some images' files, then starts a process that adds, removes or compacts, and kills
it (SIGKILL) after a random time; a commit comes every three images. After each kill the index must open, and hold each
image's proposals whole. In the end the work is finished, and the index must equal one that was made without kills, but
for the numbers of images. Encodings are drawn from the images' pixels instead of computed, so that kills meet writing.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import opensan
from opensan.index import adding
from opensan.index.head import Head
from opensan.index.store import Store
from opensan.segmenters.results import Encoding
from opensan.segmenters.san import SanSegmenter

IMAGES = 40


class Drawn(SanSegmenter):
    """The model `tiny` with an image half that draws encodings from an image's pixels."""

    def encode_prepared(self, batch):
        time.sleep(0.005)
        return [self._draw(image) for image in batch]

    def _draw(self, image) -> Encoding:
        seed = int.from_bytes(hashlib.sha256(image.image.tobytes()).digest()[:8])
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((8, 128)).astype(np.float32)
        arrays = {
            "mask_logits": rng.standard_normal((8, 12, 16)).astype(np.float32),
            "mask_embeddings": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        }
        return Encoding(arrays, image.prepared.sizes, self.identity.encodings, image.image)


def content(folder: Path) -> list:
    """Return all that an index holds, but for images' numbers; AssertionError if an image's proposals are not whole."""
    head = Head.read(folder)
    store = Store(folder, head.versions)
    images = store.rows("images", ["id", "path", "crc32", "same_as", "image_height"])
    path = {row["id"]: row["path"] for row in images}
    proposals: dict[str, list[str]] = {row["path"]: [] for row in images}
    for row in store.rows("proposals", ["image", "query", "vector", "area", "box", "mask", "contrast"]):
        proposals[path[row.pop("image")]].append(repr(sorted(row.items())))
    assert len(path) == len(images) == head.images, "an image is there twice"
    for row in images:
        count = len(set(proposals[row["path"]]))
        assert count == (8 if row["same_as"] < 0 else 0) == len(proposals[row["path"]]), (row, count)
    about = sorted((r["path"], r["crc32"], path.get(r["same_as"], ""), r["image_height"]) for r in images)
    return [about, sorted((path, sorted(rows)) for path, rows in proposals.items())]


def in_a_process(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Do the work in a process of its own, killed after `seconds`; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is None:
        status = os.waitpid(child, 0)[1]
    else:
        deadline = time.monotonic() + seconds
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        if done[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        status = done[1]
    if status:
        sys.exit("the work failed")
    return False


def picture(path: Path, rng: random.Random) -> None:
    pixels = np.frombuffer(rng.randbytes(12 * 16 * 3), np.uint8).reshape(12, 16, 3)
    Image.fromarray(pixels).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    adding.COMMIT_IMAGES = 3
    model = Drawn(opensan.load("tiny").model)
    with tempfile.TemporaryDirectory() as top:
        photos, folder = Path(top, "photos"), Path(top, "index")
        photos.mkdir()
        for number in range(IMAGES):
            picture(photos / f"{number}.png", rng)
        index = opensan.Index(folder, model)
        kills, rounds, kinds, longest = 0, 0, {"add": 0, "remove": 0, "compact": 0}, 1.0
        while kills < options.kills:
            kind = rng.choice(["add", "add", "remove", "compact"]) if rounds else "add"
            rounds += 1
            works = {
                "add": lambda: index.add(photos),
                "remove": lambda: index.remove(missing=True),
                "compact": lambda: index.compact(),
            }
            if kind == "add":
                for number in rng.sample(range(IMAGES), 12):
                    picture(photos / f"{number}.png", rng)
                shutil.copy(photos / f"{number}.png", photos / "copy.png")
            if kind == "remove":
                for number in rng.sample(range(IMAGES), 5):
                    (photos / f"{number}.png").unlink(missing_ok=True)
            if not (folder / "index.json").exists():
                kind = "add"
            began = time.monotonic()
            killed = in_a_process(works[kind], rng.uniform(0, longest))
            if not killed:
                longest = max(0.1, 0.9 * (time.monotonic() - began))
            else:
                longest *= 1.3
            kills += killed
            kinds[kind] += killed
            if (folder / "index.json").exists():
                in_a_process(lambda: content(folder) and None)
        in_a_process(lambda: index.add(photos) and None)
        in_a_process(lambda: index.remove(missing=True) and None)
        in_a_process(index.compact)

        def compare() -> None:
            fresh = opensan.Index(Path(top, "fresh"), model)
            fresh.add(photos)
            ours, new = content(folder), content(fresh.folder)
            assert [row[:2] for row in ours[0]] == [row[:2] for row in new[0]]
            assert sorted(r for _, rows in ours[1] for r in rows) == sorted(r for _, rows in new[1] for r in rows)
            print(
                json.dumps({"kills": kills, **kinds, "rounds": rounds, "images": len(ours[0]), "content": "identical"})
            )

        in_a_process(compare)


if __name__ == "__main__":
    main()
