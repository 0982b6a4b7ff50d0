"""The page's search of a collection: by keyboard, as the matches come, with mistakes told."""

import shutil
import socket

import pytest

pytest.importorskip("lancedb", reason="indexes need lancedb")

import opensan

from .browsing import SCENES, Service, browser, complaints, expect, page  # noqa: F401
from .test_page_access import violations

# ruff: noqa: F811


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    top = tmp_path_factory.mktemp("collection")
    photos = shutil.copytree(SCENES, top / "photos")
    opensan.Index(top / "scenes", "tiny").add(photos)
    (photos / "court.png").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(port, "--index", str(top / "scenes"))
    service.start()
    yield service
    assert service.stop() == 130


def test_words_find_images_of_the_collection(page, complaints):
    found = violations(page, "picture")
    page.get_by_role("button", name="Collection").press("Enter")
    expect(page.locator("#search-words")).to_be_focused()
    expect(page.locator("#collection-name")).to_have_text("3 images of scenes")
    assert not page.locator("#label-view").is_visible()
    page.keyboard.type("green heart")  # it asks by itself
    expect(page.locator("#search-status")).to_have_text("3 images, best first, of 3")
    first = page.locator("#matches li").first
    expect(first).to_contain_text("playground.png")
    assert first.locator("img").evaluate("image => image.complete && image.naturalWidth") > 100
    expect(page.locator("#matches li", has_text="court.png")).to_contain_text("the file can't be read any more")
    found += violations(page, "matches")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found += violations(page, "matches, on a dark phone")
    page.locator("#search-words").fill("grass, wood")
    page.keyboard.press("Enter")
    expect(page.locator("#matches li").first).to_contain_text("workshop.png")
    page.locator("#search-words").fill("grass, -wood")
    page.keyboard.press("Enter")
    expect(page.locator("#matches li").first).to_contain_text("court.png")
    page.locator("#search-words").fill("zeppelin")
    page.keyboard.press("Enter")
    expect(page.locator("#search-problem")).to_contain_text("the model has never read 'zeppelin'")
    expect(page.locator("#matches li")).to_have_count(0)
    found += violations(page, "a word that the model never read")
    complaints.clear()  # the browser tells of the refusal
    page.get_by_role("button", name="One picture").click()
    expect(page.locator("#label-view")).to_be_visible()
    page.locator("#view-picture").press("s")
    expect(page.locator("#search-words")).to_be_focused()
    assert not found, "\n".join(found)
