"""How long from a key pressed to the new colours on the page? Measured in the browser itself, by the page's own clock.

    python bench/keystroke.py [--keys 40] [--threads 2] [--json FILE]

A headless Chromium (Debian's, or where --chromium says) opens a picture of 640x853 pixels and types the 20th word after
19 others, a key every 200 ms: each half-typed word is new to the model. Counted is from the input event to the end of
the frame in which the canvas was painted. "answer" is the part between request and response; the rest is the browser's.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import warnings
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import opensan
from opensan.vocabulary import Vocabulary

CASES = (("tiny", None), ("san-vit-b16", 0))
SIZE = (640, 853)
SCENE = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"
WORDS = 20
BETWEEN_KEYS_MS = 200
MEASURES = "() => performance.getEntriesByName('keystroke').map((entry) => entry.duration)"
ANSWERS = """() => performance.getEntriesByType('resource')
    .filter((entry) => entry.name.includes('confidence=false')).map((entry) => entry.duration)"""


def serve(name: str, seed: int | None, threads: int, urls) -> None:
    """A process of its own, as `opensan ui` would be."""
    import torch

    from opensan.serve import create_app
    from opensan.serve.server import bind, run

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # random weights, and half-typed words that tiny has never seen
    segmenter = opensan.load(name, random_weights=seed, text_cache=False)
    run(create_app(segmenter, page=True), bind("127.0.0.1", 0), urls.put)


def letters() -> "itertools.chain[str]":
    """Names of things, letter by letter, after those that stand there already."""
    names = Vocabulary.ready("ade20k_847").names[WORDS:]
    return itertools.chain.from_iterable(name.split(",")[0] for name in names)


def measure(page: Page, url: str, picture: Path, keys: int) -> dict[str, float]:
    """Medians in milliseconds of `keys` keystrokes, and their 90th percentile."""
    page.goto(url)
    page.set_input_files("#file", picture)
    field = page.locator("#word-input-a")
    kept = Vocabulary.ready("ade20k_847").names[: WORDS - 1]
    field.fill("".join(f"{name.split(',')[0]}, " for name in kept))
    page.locator(".chip .share", has_text="%").first.wait_for(timeout=120_000)
    page.wait_for_timeout(3000)
    page.evaluate("() => { performance.clearMeasures(); performance.clearResourceTimings(); }")
    page.evaluate("() => performance.setResourceTimingBufferSize(5000)")
    for letter in itertools.islice(letters(), keys):
        field.press_sequentially(letter)
        page.wait_for_timeout(BETWEEN_KEYS_MS)
    page.wait_for_timeout(1000)
    durations, answers = page.evaluate(MEASURES), page.evaluate(ANSWERS)
    return {
        "drawn": len(durations),
        "median_ms": statistics.median(durations),
        "p90_ms": statistics.quantiles(durations, n=10)[-1],
        "answer_ms": statistics.median(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    print("| model | overlays drawn | median, ms | 90th percentile, ms | of which the answer, ms |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        picture = Path(folder) / "picture.png"
        Image.open(SCENE).convert("RGB").resize(SIZE[::-1]).save(picture)
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, seed in CASES:
            urls = context.Queue()
            server = context.Process(target=serve, args=(name, seed, options.threads, urls), daemon=True)
            server.start()
            row = measure(browser.new_page(), urls.get(timeout=90), picture, options.keys)
            row = {"model": name if seed is None else f"{name}, random weights", **row}
            print(
                f"| {row['model']} | {row['drawn']} of {options.keys} keys | {row['median_ms']:.0f} "
                f"| {row['p90_ms']:.0f} | {row['answer_ms']:.0f} |",
                flush=True,
            )
            rows.append(row)
            server.terminate()
            server.join()
        browser.close()
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "size": SIZE, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
