"""Measure an index of many proposals: size, build time, memory, query time, recall of approximate against exact search.

    python bench/index_scale.py --like INDEX --proposals 100000 1000000

Vectors are generated: each is one of the proposals of INDEX, a small index of really encoded images, plus noise of
length --noise, normalised again; areas, boxes and masks are its own. Images have --each proposals. Queries are words of
COCO-Stuff 171 against the others. Recall is the share of the exact search's first ten and fifty images that the
approximate one returns. Prints a line of JSON for each number of proposals.
"""

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

import opensan
from opensan.index.head import Head
from opensan.index.rows import SIZES, schemas
from opensan.index.scoring import vectors_of
from opensan.index.store import Store
from opensan.vocabulary import Vocabulary

STEP = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--proposals", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--each", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--exact-queries", type=int, default=10)
    options = parser.parse_args()
    for count in options.proposals:
        with tempfile.TemporaryDirectory() as top:
            print(json.dumps(measure(Path(top, "index"), count, options)), flush=True)


def measure(folder: Path, count: int, options: argparse.Namespace) -> dict:
    like = Head.read(options.like)
    folder.mkdir()
    began = time.perf_counter()
    store = build(folder, count, like, options)
    head = replace(like, versions=store.versions, images=-(-count // options.each), proposals=count, exact=False)
    store.flush()
    built = time.perf_counter() - began
    size = bytes_in(folder)
    began = time.perf_counter()
    store.merge(approximate_from=0)
    replace(head, versions=store.versions).write(folder)
    store.forget_older()
    indexed = time.perf_counter() - began
    index = opensan.Index(folder, like.source)
    names = Vocabulary.ready("coco_stuff_171").names
    words = names[:: max(1, len(names) // options.queries)][: options.queries]
    index.search(words[0], against=names)  # loads the model, embeds the words
    fast, near = timed(index, words, names, None)
    slow, exact = timed(index, words[: options.exact_queries], names, False)
    recall = {
        top: float(np.mean([len(set(a[:top]) & set(e[:top])) / top for a, e in zip(near, exact, strict=False)]))
        for top in (10, 50)
    }
    return {
        "proposals": count,
        "images": head.images,
        "width": head.width,
        "build seconds": round(built, 1),
        "bytes a proposal": round(size / count, 1),
        "GB": round(size / 1e9, 3),
        "index seconds": round(indexed, 1),
        "GB with index": round(bytes_in(folder) / 1e9, 3),
        "peak memory GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "approximate median, 99th percentile (s)": [round(float(np.percentile(fast, q)), 3) for q in (50, 99)],
        "exact median, worst (s)": [round(float(np.percentile(slow, q)), 3) for q in (50, 100)],
        "recall at 10, at 50": [round(recall[10], 3), round(recall[50], 3)],
    }


def timed(index: opensan.Index, words: list[str], names: list[str], approximate: bool | None) -> tuple[list, list]:
    seconds, found = [], []
    for word in words:
        began = time.perf_counter()
        answer = index.search(word, against=names, approximate=approximate)
        seconds.append(time.perf_counter() - began)
        found.append([match.path for match in answer])
    return seconds, found


def build(folder: Path, count: int, like: Head, options: argparse.Namespace) -> Store:
    """Write generated rows, `STEP` proposals a commit."""
    rng = np.random.default_rng(0)
    source = Store(options.like, like.versions)
    rows = source.rows("images", schemas(like.width)["images"].names)
    image = rows[0] | {"encoding": None, "same_as": -1}
    alike = [row["id"] for row in rows if all(row[name] == image[name] for name in SIZES)]
    batches = list(source.batches("proposals", ["vector", "area", "box", "mask"], "image", alike))
    vectors = np.concatenate([vectors_of(batch) for batch in batches]).astype(np.float32)
    rest = pa.Table.from_batches(batches).drop_columns(["vector"])
    store = Store.create(folder, schemas(like.width))
    schema = schemas(like.width)["proposals"]
    for start in range(0, count, STEP):
        ids = np.arange(start, min(count, start + STEP))
        chosen = rng.integers(len(vectors), size=len(ids))
        noise = rng.standard_normal((len(ids), like.width), dtype=np.float32)
        made = vectors[chosen] + options.noise / np.sqrt(like.width) * noise
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        taken = rest.take(pa.array(chosen))
        columns = {
            "image": pa.array(ids // options.each + 1),
            "query": pa.array((ids % options.each).astype(np.int16)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(made.astype(np.float16).ravel()), like.width),
            **{name: taken[name] for name in taken.column_names},
        }
        store.append("proposals", pa.table(columns).select(schema.names).cast(schema))
    for start in range(1, -(-count // options.each) + 1, STEP):
        numbers = range(start, min(start + STEP, -(-count // options.each) + 1))
        rows = [image | {"id": number, "path": f"/images/{number:09}.jpg"} for number in numbers]
        store.append("images", pa.Table.from_pylist(rows, schema=schemas(like.width)["images"]))
    return store


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
