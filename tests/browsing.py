"""The web page in a real browser: Debian's Chromium, without a screen, against `opensan ui --model tiny`."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.outputs import palette

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
"""Chromium's own moving picture in place of a camera, allowed without asking."""
SCENES = Path(opensan.__file__).parent / "assets" / "scenes"
PLAYGROUND = SCENES / "playground.png"

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
if not CHROMIUM.exists():
    pytest.skip(f"there is no {CHROMIUM}", allow_module_level=True)

from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

expect.set_options(timeout=30_000)

OVERLAY = """() => document.querySelector("#overlay-a").toDataURL()"""


class Service:
    """`opensan ui` in a process of its own."""

    def __init__(self, port: int, *more: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        own = ["--model", "tiny", "--no-open", "--port", str(port)]
        self._command = [sys.executable, "-m", "opensan", "ui", *own, *more]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(opensan.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout.readline() == f"{self.url}\n"

    def stop(self) -> int:
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(60)
        self._process.stdout.close()
        return code


@pytest.fixture(scope="module")
def service():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(port)
    service.start()
    yield service
    assert service.stop() == 130


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *FAKE_CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console tells; whoever provokes some has to clear it."""
    return []


@pytest.fixture
def page(service, browser, complaints):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(service.url)
    expect(page.locator("#model")).to_contain_text("tiny")
    yield page
    context.close()
    assert complaints == [], complaints


@pytest.fixture(scope="module")
def segmenter():
    return opensan.load("tiny", text_cache=False)


def open_picture(page: Page, path: Path = PLAYGROUND) -> None:
    page.set_input_files("#file", path)
    expect(page.locator("#waiting")).to_be_hidden()
    expect(page.locator("#spoken")).to_contain_text("is open")


def words_of(page: Page, words: str) -> None:
    page.locator("#word-input-a").fill(words)


def settled(page: Page) -> None:
    """Until the confidences are there, which come last."""
    page.locator("#pointing").hover(position={"x": 5, "y": 5})
    expect(page.locator("#tip")).to_contain_text("%")


def overlay(page: Page) -> np.ndarray:
    """[480, 640, 4] of the first side's canvas."""
    _, _, data = page.evaluate(OVERLAY).partition(",")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def inside(labels: np.ndarray) -> np.ndarray:
    """[H, W]: pixels that are on no border."""
    same = np.ones_like(labels, dtype=bool)
    same[:-1] &= labels[:-1] == labels[1:]
    same[:, :-1] &= labels[:, :-1] == labels[:, 1:]
    return same


def assert_shows(page: Page, labels: np.ndarray) -> None:
    colours = palette(labels.max() + 1)
    shown, within = overlay(page), inside(labels)
    labelled = within & (labels >= 0)
    assert (shown[labelled][:, :3] == colours[labels[labelled]]).all()
    assert (shown[labelled][:, 3] == 255).all()
    assert (shown[within & (labels < 0)][:, 3] == 0).all()


def download(page: Page, name: str) -> tuple[bytes, str]:
    with page.expect_download() as found:
        page.get_by_role("button", name=name, exact=True).click()
    return found.value.path().read_bytes(), found.value.suggested_filename
