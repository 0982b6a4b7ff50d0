"""The web page: where pictures come from, the camera, what survives a reload, links, models."""

import re
from pathlib import Path

import pytest

import opensan
from opensan.cli.demo import WORDS

from .browsing import (  # noqa: F401
    PLAYGROUND,
    browser,
    complaints,
    expect,
    open_picture,
    overlay,
    page,
    segmenter,
    service,
    settled,
    words_of,
)

# ruff: noqa: F811

ATTRIBUTION = Path(opensan.__file__).parent / "assets" / "photographs" / "ATTRIBUTION.md"


def choose_photo(page) -> None:
    page.get_by_label("Model").select_option("photo")


def shares(page, count: int) -> None:
    expect(page.locator(".chip .share", has_text="%")).to_have_count(count)


def test_words_choices_and_the_picture_survive_a_reload(page):
    open_picture(page)
    words_of(page, "night sky, brick|bricks, ")
    page.get_by_text("Background words").first.click()
    page.get_by_label("Their pixels stay unlabelled.").first.fill("grass,")
    page.get_by_label("Colours").select_option("vivid")
    page.get_by_label("Compare two vocabularies").check()
    page.keyboard.type("green heart,water")
    shares(page, 3)
    settled(page)
    before = overlay(page)
    page.reload()
    shares(page, 4)
    assert set(page.locator(".chip .name").all_text_contents()) == {
        "night sky",
        "brick",
        "grass",
        "green heart",
        "water",
    }
    expect(page.get_by_label("Colours")).to_have_value("vivid")
    expect(page.get_by_label("Compare two vocabularies")).to_be_checked()
    settled(page)
    assert (overlay(page) == before).all()


def test_a_link_reopens_the_same_words(page, browser, service):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    words_of(page, "night sky, grass|meadow, ")
    page.get_by_role("button", name="Copy link to these words").click()
    expect(page.locator("#copied")).to_have_text("The link is copied.")
    link = page.evaluate("() => navigator.clipboard.readText()")
    assert link == page.url and link.startswith(f"{service.url}/#a=night+sky&a=grass%7Cmeadow")
    other = browser.new_context().new_page()
    other.goto(link)
    expect(other.locator(".chip .name")).to_have_text(["night sky", "grass"])
    other.goto(link.replace("tiny", "unknown").replace("night", "blue"))
    expect(other.locator(".chip .name")).to_have_text(["blue sky", "grass"])
    expect(other.locator("#problem")).to_contain_text("names the model unknown")
    other.locator("#word-input-a").fill("brick,")
    expect(other.locator(".chip .name")).to_have_text(["blue sky", "grass", "brick"])
    assert other.url == f"{service.url}/"
    other.reload()
    expect(other.locator(".chip .name")).to_have_text(["blue sky", "grass", "brick"])
    other.context.close()


def test_another_model_labels_the_picture_anew(page):
    expect(page.get_by_label("Model").locator("option")).to_have_text(["tiny", "photo"])
    open_picture(page)
    words_of(page, "night sky, brick, ")
    settled(page)
    before = overlay(page)
    with page.expect_response(re.compile(r"encodings\?model=photo")):
        choose_photo(page)
    expect(page.locator("#waiting")).to_be_hidden()
    expect(page.locator(".never").first).to_contain_text("brick")
    settled(page)
    assert (overlay(page) != before).any()
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("photo")


def test_a_picture_chosen_while_the_page_still_loads_is_opened(page):
    held = []
    page.route("**/v1/info", lambda route: held.append(route))
    page.reload()
    page.wait_for_timeout(500)
    page.set_input_files("#file", PLAYGROUND)
    assert held
    for route in held:
        route.continue_()
    expect(page.locator("#spoken")).to_contain_text("playground.png is open")


def test_the_photographs_name_their_authors_and_words(page):
    choose_photo(page)
    page.locator("#word-input-a").fill("")
    told = ATTRIBUTION.read_text()
    for name, words in WORDS.items():
        page.locator("#examples").get_by_role("button", name=name).click()
        shares(page, len(words.split(", ")))
        assert set(page.locator(".chip .name").all_text_contents()) == set(words.split(", "))
        author = page.locator("#credit a").first
        row = next(line for line in told.splitlines() if line.startswith(f"| {name}.jpg"))
        address = re.search(r"https://[^\s|]+", row)[0]
        expect(author).to_have_attribute("href", address)
        assert author.text_content().replace("“", '"').replace("”", '"') in row
    expect(page.locator("#credit")).to_contain_text("CC BY 2.0")
    open_picture(page)
    expect(page.locator("#credit")).to_be_hidden()


def test_a_picture_is_pasted_by_a_button(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("""async () => {
      const blob = await (await fetch("scenes/court.png")).blob();
      await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    }""")
    page.locator("#welcome").get_by_role("button", name="paste").click()
    expect(page.locator("#spoken")).to_contain_text("pasted.png is open")
    page.evaluate("() => navigator.clipboard.writeText('words')")
    page.get_by_role("button", name="Paste", exact=True).click()
    expect(page.locator("#problem")).to_contain_text("holds no picture")


def test_the_camera_is_labelled_while_words_change(page):
    frames, underway, most = [], [], [0]

    def began(request):
        if "v1/encodings?" in request.url:
            underway.append(request)
            most[0] = max(most[0], len(underway))
        elif "segmentation" in request.url:
            frames.append(
                [each["name"] if isinstance(each, dict) else each for each in request.post_data_json["words"]]
            )

    def ended(request):
        if "segmentation" in request.url and underway:
            underway.pop()

    page.on("request", began)
    page.on("requestfinished", ended)
    words_of(page, "grass, brick, ")
    page.locator("#welcome").get_by_role("button", name="camera").click()
    expect(page.locator("#time")).to_have_text(re.compile(r"^[\d.]+ frames a second$"))
    shares(page, 2)
    first = overlay(page)
    page.locator("#word-input-a").press_sequentially("night sky", delay=900)
    expect(page.locator(".entry .share").first).to_contain_text("%")
    page.wait_for_function("count => performance.getEntriesByName('frame').length > count", arg=12)
    assert frames[0] == ["grass", "brick"] and ["grass", "brick", "night sky"] in frames
    assert any(words[-1].startswith("n") and words[-1] != "night sky" for words in frames)
    assert most[0] == 1
    assert first.shape == overlay(page).shape
    page.get_by_role("button", name="Stop camera").click()
    expect(page.locator("#spoken")).to_contain_text("camera.jpg is open")
    settled(page)
    expect(page.get_by_role("button", name="Label map", exact=True)).to_be_enabled()


def test_a_click_on_the_camera_stops_it_and_explains(page):
    words_of(page, "grass, brick, ")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Camera", exact=True).click()
    shares(page, 2)
    page.locator("#pointing").click(position={"x": 40, "y": 40})
    expect(page.locator("#inspect-title")).to_have_text(re.compile("^Why “.*” here"))
    expect(page.get_by_role("button", name="Camera", exact=True)).to_be_visible()


@pytest.mark.parametrize("compare", [False, True])
def test_the_camera_shows_both_sides_and_goes_on_after_an_outage(page, service, complaints, compare):
    words_of(page, "grass, brick, ")
    if compare:
        page.get_by_label("Compare two vocabularies").check()
        page.keyboard.type("night sky, brick,")
    page.get_by_role("button", name="Camera", exact=True).click()
    shares(page, 4 if compare else 2)
    if compare:
        return
    service.stop()
    expect(page.locator("#problem")).to_contain_text("goes on when it is back")
    service.start()
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#time")).to_contain_text("frames a second")
    complaints.clear()  # the browser notes what failed


def test_without_a_camera_the_page_says_so(page):
    page.evaluate("""() => {
      navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("", "NotFoundError"));
    }""")
    page.get_by_role("button", name="Camera", exact=True).click()
    expect(page.locator("#problem")).to_have_text("No camera was found.")
    open_picture(page)
    expect(page.locator("#problem")).to_be_hidden()
