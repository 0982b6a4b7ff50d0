"""Measure an index of many proposals: size, build time, memory, query time, recall of approximate against exact search.

    python bench/index_scale.py --like INDEX --proposals 100000 1000000
    python bench/index_scale.py --like INDEX --as-it-is

Vectors are generated: each is one of the proposals of INDEX, a small index of really encoded images, plus noise of
length --noise, normalised again; areas, boxes and masks are its own. Images have --each proposals. Queries are words
of the bundled label sets against the default contrast words, whose part is stored with each proposal. --whole-queries
of them are asked without these stored parts too, and the largest difference of a score is told. Recall is the share of
the exact search's first ten and fifty images that the approximate one returns. Prints a line of JSON for each number of
proposals. With --as-it-is, a copy of INDEX itself is asked.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

import opensan
from opensan.index.contrast import Contrast
from opensan.index.head import FORMAT, Head
from opensan.index.rows import SIZES, schemas, vectors_of
from opensan.index.store import Store
from opensan.index.writer import writing
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
    parser.add_argument("--whole-queries", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the index is made, and removed again; default: temporary")
    parser.add_argument("--as-it-is", action="store_true")
    options = parser.parse_args()
    if options.as_it_is:
        with tempfile.TemporaryDirectory(dir=options.folder) as top:
            print(json.dumps(as_it_is(shutil.copytree(options.like, Path(top, "index")), options)))
        return
    for count in options.proposals:
        with tempfile.TemporaryDirectory(dir=options.folder) as top:
            print(json.dumps(measure(Path(top, "index"), count, options)), flush=True)


def measure(folder: Path, count: int, options: argparse.Namespace) -> dict:
    like = Head.read(options.like)
    folder.mkdir()
    segmenter = opensan.load(like.source)
    index, contrast = opensan.Index(folder, segmenter), Contrast(segmenter)
    began, worked = time.perf_counter(), time.process_time()
    store = build(folder, count, like, contrast, options)
    images = -(-count // options.each)
    head = replace(like, images=images, proposals=count, exact=False, contrast=contrast.identity, format=FORMAT)
    replace(head, versions=store.versions).write(folder)
    store.flush()
    built = time.perf_counter() - began, time.process_time() - worked
    size = bytes_in(folder)
    words = known_words(segmenter, options.queries)
    index.search(words[0], top=1)  # embeds the words
    slow, exact = timed(index, words[: options.exact_queries], approximate=False)
    replace(head, versions=store.versions, contrast="").write(folder)
    slowest, whole = timed(index, words[: options.whole_queries], approximate=False)
    began, worked = time.perf_counter(), time.process_time()
    store.merge(approximate_from=0)
    replace(head, versions=store.versions).write(folder)
    store.forget_older()
    indexed = time.perf_counter() - began, time.process_time() - worked
    fast, near = timed(index, words, approximate=True)
    ranked = [[list(answer) for answer in answers] for answers in (near, exact)]
    recall = {
        top: float(np.mean([len(set(a[:top]) & set(e[:top])) / top for a, e in zip(*ranked, strict=False)]))
        for top in (10, 50)
    }
    both = list(zip(exact, whole, strict=False))
    return {
        "proposals": count,
        "images": images,
        "width": head.width,
        "build seconds, of a processor": [round(each, 1) for each in built],
        "bytes a proposal": round(size / count, 1),
        "GB": round(size / 1e9, 3),
        "index seconds, of a processor": [round(each, 1) for each in indexed],
        "GB with index": round(bytes_in(folder) / 1e9, 3),
        "peak memory GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "whole softmax, median: seconds, of a processor": [percentiles(each, 50) for each in slowest],
        "exact by stored parts, median, worst: seconds, of a processor": [percentiles(each, 50, 100) for each in slow],
        "largest difference of a score": max(
            (abs(a[p] - b[p]) for a, b in both for p in a.keys() & b.keys()), default=0
        ),
        "same first 50": [float(np.mean([list(a) == list(b) for a, b in both])) if both else None],
        "approximate median, 99th percentile: seconds, of a processor": [percentiles(each, 50, 99) for each in fast],
        "recall at 10, at 50": [round(recall[10], 3), round(recall[50], 3)],
    }


def as_it_is(folder: Path, options: argparse.Namespace) -> dict:
    """Ask a copy of an index exactly, and then by an index of its vectors."""
    head = Head.read(folder)
    segmenter = opensan.load(head.source)
    index, words = opensan.Index(folder, segmenter), known_words(segmenter, options.queries)
    index.search(words[0], top=1)
    slow, exact = timed(index, words, approximate=False)
    with writing(folder, None) as writer:
        writer.merge(approximate_from=0)
    fast, near = timed(index, words, approximate=True)
    ranked = [(list(a), list(e)) for a, e in zip(near, exact, strict=True)]
    return {
        "images": head.images,
        "proposals": head.proposals,
        "bytes an image": round(bytes_in(options.like) / head.images),
        "queries": len(words),
        "contrast words": len(Contrast(segmenter).vocabulary.names),
        "exact, median, 99th percentile: seconds, of a processor": [percentiles(each, 50, 99) for each in slow],
        "approximate, the same": [percentiles(each, 50, 99) for each in fast],
        "recall at 10, at 50": [
            round(float(np.mean([len(set(a[:top]) & set(e[:top])) / top for a, e in ranked])), 3) for top in (10, 50)
        ],
    }


def known_words(segmenter: opensan.Segmenter, count: int) -> list[str]:
    """Return about so many words of the bundled label sets that the model has read, evenly spread."""
    names = Contrast(segmenter).vocabulary.names
    unseen = set(segmenter.unseen_texts(Vocabulary.parse(names)))
    names = [name for name in names if name not in unseen]
    return names[:: max(1, len(names) // count)][:count]


def percentiles(seconds: list[float], *which: int) -> list[float]:
    return [round(float(np.percentile(seconds, q)), 3) for q in which] if seconds else []


def timed(
    index: opensan.Index, words: list[str], *, approximate: bool
) -> tuple[tuple[list[float], list[float]], list[dict[str, float]]]:
    """Return each query's seconds, on the clock and of a processor, and the scores of its images by path, best first.

    On a machine that is busy with other work, seconds on the clock tell little.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    found = []
    for word in words:
        began = time.perf_counter(), time.process_time()
        answer = index.search(word, approximate=approximate)
        seconds[0].append(time.perf_counter() - began[0])
        seconds[1].append(time.process_time() - began[1])
        found.append({match.path: match.score for match in answer})
    return seconds, found


def build(folder: Path, count: int, like: Head, contrast: Contrast, options: argparse.Namespace) -> Store:
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
        made = made.astype(np.float16)
        taken = rest.take(pa.array(chosen))
        columns = {
            "image": pa.array(ids // options.each + 1),
            "query": pa.array((ids % options.each).astype(np.int16)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(made.ravel()), like.width),
            **{name: taken[name] for name in taken.column_names},
            "contrast": pa.array(contrast.of(made)),
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
