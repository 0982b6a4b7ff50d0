"""The pictures of the page in the documentation, taken from `photo` and the bundled photographs.

python bench/screenshots.py [--out docs/page] [--only NAME]
"""

import argparse
import io
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from keystroke import serve
from opensan.files import ASSETS
from opensan.outputs import palette

CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
WALK = 24
"""Pictures of the film that is played in place of a camera: a bundled photograph, as one walks past it."""
COLOURS = 192
"""Of a PNG, which keeps the files small."""
WORDS = 8


@dataclass(frozen=True)
class Shot:
    """One picture: the screen, in CSS pixels, and what is done before it is taken."""

    width: int
    height: int
    steps: Callable[[Page], None]
    scheme: Any = "light"
    scale: float = 1


def example(page: Page, name: str) -> None:
    """Open a photograph of the package with its words."""
    page.locator("#examples").get_by_role("button", name=name).click()
    settle(page)


def settle(page: Page) -> None:
    """Wait for the full answer."""
    page.locator(".chip .share", has_text="%").first.wait_for(timeout=60_000)
    page.wait_for_timeout(2500)
    page.mouse.move(2, 2)


def street(page: Page) -> None:
    example(page, "street")


def why(page: Page) -> None:
    example(page, "street")
    box = page.locator("#pointing").bounding_box()
    assert box
    page.mouse.click(box["x"] + 0.66 * box["width"], box["y"] + 0.65 * box["height"])
    page.locator("#inspect").wait_for()
    page.wait_for_timeout(500)


def room(page: Page) -> None:
    example(page, "room")


def compare(page: Page) -> None:
    example(page, "street")
    page.get_by_label("Compare two vocabularies").check()
    page.keyboard.type("sky, street, bicycle, bush,")
    settle(page)


def camera(page: Page) -> None:
    page.locator("#word-input-a").fill("sky, road, tree, bicycle, ")
    page.locator(".tools [data-do=camera]").click()
    page.locator("#time", has_text="frames").wait_for(timeout=60_000)
    page.wait_for_timeout(2500)


SHOTS = {
    "desktop": Shot(1280, 800, why),
    "dark": Shot(1280, 800, room, "dark"),
    "compare": Shot(1280, 880, compare),
    "camera": Shot(1280, 800, camera),
    "phone": Shot(390, 780, street),
    "zoom": Shot(640, 400, street, scale=2),
}


def few_colours(picture: Image.Image) -> Image.Image:
    """Return the picture in COLOURS colours and those of the first words, however few pixels have these."""
    common = picture.quantize(COLOURS, dither=Image.Dither.NONE).getpalette() or []
    chosen = Image.new("P", (1, 1))
    chosen.putpalette([*common[: 3 * COLOURS], *palette(WORDS).ravel().tolist()])
    return picture.quantize(palette=chosen, dither=Image.Dither.NONE)


def film(path: Path) -> str:
    """Write the film of a camera as Motion JPEG, which is JPEG files in a row, and return Chromium's option for it."""
    photograph = Image.open(ASSETS / "photographs" / "street.jpg").convert("RGB")
    width = photograph.height * 4 // 3
    with path.open("wb") as file:
        for step in range(WALK):
            left = (photograph.width - width) * step // (WALK - 1)
            picture = photograph.crop((left, 0, left + width, photograph.height)).resize((640, 480))
            picture.save(file, "JPEG", quality=90)
    return f"--use-file-for-fake-video-capture={path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/page"))
    parser.add_argument("--only", choices=SHOTS)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    urls = context.Queue()
    server = context.Process(target=serve, args=("photo", None, 1, urls), daemon=True)
    server.start()
    url = urls.get(timeout=90)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", *CAMERA, film(Path(folder) / "walk.mjpeg")]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        for name, shot in SHOTS.items():
            if options.only not in (None, name):
                continue
            screen = browser.new_context(
                viewport={"width": shot.width, "height": shot.height},
                color_scheme=shot.scheme,
                device_scale_factor=shot.scale,
            )
            page = screen.new_page()
            page.goto(url)
            shot.steps(page)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = options.out / f"{name}.png"
            few_colours(picture).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size:,} bytes")
            screen.close()
        browser.close()
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()
