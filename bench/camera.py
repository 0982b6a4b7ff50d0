"""How many of a camera's pictures a second does the page label? Measured in the browser, by the page's own clock.

    python bench/camera.py [--seconds 20] [--threads 2] [--json FILE]

A headless Chromium (Debian's, or where --chromium says) plays its own moving test picture, 640x480 and 60 a second, in
place of a camera. The page labels it with 8 words, and in the second half of the time a ninth is typed, letter by
letter. Counted are the pictures shown with their labels; one is underway at a time.
"""

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from keystroke import CASES, serve

WORDS = "sky, road, building, tree, car, person, bicycle, grass, "
TYPED = "pavement"
CAMERA = ("--use-fake-device-for-media-stream=fps=60", "--use-fake-ui-for-media-stream")
FRAMES = "() => performance.getEntriesByName('frame').map((entry) => [entry.startTime, entry.duration])"


def measure(page: Page, url: str, seconds: float) -> dict[str, float]:
    """Return pictures a second with the words at rest and while typing, and a picture's median time in milliseconds."""
    page.goto(url)
    page.locator("#word-input-a").fill(WORDS)
    page.locator(".tools [data-do=camera]").click()
    page.wait_for_function("() => performance.getEntriesByName('frame').length > 3", timeout=120_000)
    page.evaluate("() => performance.clearMeasures()")
    page.wait_for_timeout(seconds * 500)
    at_rest = page.evaluate(FRAMES)
    page.evaluate("() => performance.clearMeasures()")
    page.locator("#word-input-a").press_sequentially(TYPED, delay=seconds * 500 / len(TYPED))
    typing = page.evaluate(FRAMES)
    return {
        "at_rest": 2 * len(at_rest) / seconds,
        "typing": 2 * len(typing) / seconds,
        "picture_ms": statistics.median(duration for _, duration in at_rest) if at_rest else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    print("| model | pictures a second | while typing | a picture, median, ms |")
    print("|---|---|---|---|")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", *CAMERA]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        for name, seed in (("photo", None), *CASES):
            urls = context.Queue()
            server = context.Process(target=serve, args=(name, seed, options.threads, urls), daemon=True)
            server.start()
            row = measure(browser.new_page(), urls.get(timeout=90), options.seconds)
            row = {"model": name if seed is None else f"{name}, random weights", **row}
            print(
                f"| {row['model']} | {row['at_rest']:.1f} | {row['typing']:.1f} | {row['picture_ms']:.0f} |", flush=True
            )
            rows.append(row)
            server.terminate()
            server.join()
        browser.close()
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
