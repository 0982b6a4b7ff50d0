"""The web page: words, colours, explanations, comparisons, downloads."""

import base64
import io
import json
import re
import urllib.request
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from opensan.outputs import overlay as overlay_of
from opensan.outputs import palette, read_label_map
from opensan.outputs.regions import name_places

from .browsing import (  # noqa: F401
    PLAYGROUND,
    Page,
    assert_shows,
    browser,
    complaints,
    download,
    expect,
    inside,
    open_picture,
    overlay,
    page,
    segmenter,
    service,
    settled,
    words_of,
)

# ruff: noqa: F811

FULL_ANSWER = re.compile("confidence=true")


def test_every_keystroke_labels_the_picture_and_results_are_those_of_the_package(page, segmenter, tmp_path):
    sent = []
    page.on("request", lambda request: sent.append((request.method, request.url)))
    open_picture(page)
    words_of(page, "night sky, brick, ")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(2)
    page.locator("#word-input-a").press_sequentially("green heart", delay=30)  # and no Enter
    expect(page.locator(".entry .share").first).to_contain_text("%")
    settled(page)
    wanted = segmenter.segment(PLAYGROUND, ["night sky", "brick", "green heart"])
    assert_shows(page, wanted.labels)
    assert [url for method, url in sent if method == "POST"].count(f"{page.url}v1/encodings?model=tiny") == 1

    label_map, name = download(page, "Label map")
    (tmp_path / name).write_bytes(label_map)
    assert name == "playground.labels.png"
    assert (read_label_map(tmp_path / name) == wanted.labels).all()
    picture, name = download(page, "Overlay")
    assert name == "playground.overlay.png"
    assert (np.asarray(Image.open(io.BytesIO(picture))) == np.asarray(wanted.overlay())).all()
    record, name = download(page, "JSON")
    assert name == "playground.segments.json"
    assert [word["name"] for word in json.loads(record)["words"]] == wanted.names
    assert json.loads(record)["words"][2]["area"] == wanted.areas["green heart"]


def test_each_letter_changes_the_overlay_with_the_colours_of_earlier_words_kept(page):
    open_picture(page)
    words_of(page, "night sky, brick, ")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(2)
    before = overlay(page)
    chip = page.locator(".chip", has_text="night sky").locator(".swatch")
    colour = chip.evaluate("(element) => element.style.backgroundColor")
    page.locator("#word-input-a").press_sequentially("white heart")
    expect(page.locator(".entry .share").first).to_contain_text("%")
    settled(page)
    changed = (overlay(page) != before).any(axis=-1)
    assert 0.02 < changed.mean() < 0.3
    assert chip.evaluate("(element) => element.style.backgroundColor") == colour == "rgb(230, 159, 0)"


def test_superseded_questions_are_never_sent(page, segmenter):
    open_picture(page)
    held = []
    page.route(re.compile("confidence=false"), lambda route: held.append(route))
    field = page.locator("#word-input-a")
    field.press_sequentially("brick, night")
    page.wait_for_timeout(200)
    assert len(held) == 1
    assert json.loads(held[0].request.post_data)["words"][0]["name"] == "b"
    field.press_sequentially(" sky")
    with page.expect_request(re.compile("confidence=false")):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert len(held) == 2
    words = json.loads(held[1].request.post_data)["words"]
    assert [words[0], words[1]["name"]] == ["brick", "night sky"]
    held[1].continue_()
    settled(page)
    assert_shows(page, segmenter.segment(PLAYGROUND, ["brick", "night sky"]).labels)


def test_synonyms_background_and_hidden_words(page, segmenter):
    open_picture(page)
    words_of(page, "brick|bricks, green heart|heart, ")
    expect(page.locator(".chip .synonyms").first).to_have_text("bricks")
    page.get_by_text("Background words").first.click()
    page.get_by_label("Their pixels stay unlabelled.").first.fill("night sky")
    settled(page)
    wanted = segmenter.segment(PLAYGROUND, ["brick|bricks", "green heart|heart"], background=["night sky"])
    assert (wanted.labels < 0).any()
    assert_shows(page, wanted.labels)
    page.locator(".chip .body").first.click()
    expect(page.locator(".chip .body").first).to_have_attribute("aria-pressed", "false")
    assert (overlay(page)[(wanted.labels == 0) & inside(wanted.labels)][:, 3] == 0).all()


def test_what_fits_no_word_and_what_is_less_sure_stays_unlabelled_on_demand(page, segmenter, tmp_path):
    open_picture(page)
    words_of(page, "green heart,")
    settled(page)
    assert_shows(page, segmenter.segment(PLAYGROUND, "green heart").labels)
    with page.expect_response(FULL_ANSWER):  # which is shown without confidences before
        page.get_by_label("Leave unlabelled what fits no word").check()
    wanted = segmenter.segment(PLAYGROUND, "green heart", rest=True)
    assert 0 < (wanted.labels == 0).mean() < 0.5
    assert_shows(page, wanted.labels)

    with page.expect_response(FULL_ANSWER):
        page.get_by_label("Surer than").fill("90")
    surer = wanted.above(0.9)
    assert 0 < (surer.labels == 0).sum() < (wanted.labels == 0).sum()
    assert_shows(page, surer.labels)
    label_map, name = download(page, "Label map")
    (tmp_path / name).write_bytes(label_map)
    assert (read_label_map(tmp_path / name) == surer.labels).all()

    page.reload()
    settled(page)
    expect(page.get_by_label("Leave unlabelled what fits no word")).to_be_checked()
    expect(page.locator("#threshold-value")).to_have_text("90 %")
    assert_shows(page, surer.labels)


def test_hover_and_click_tell_the_region(page, segmenter):
    open_picture(page)
    words_of(page, "night sky, brick, green heart, ")
    settled(page)
    box = page.locator("#pointing").bounding_box()
    x, y = 380, 80
    page.mouse.move(box["x"] + (x + 0.5) / 640 * box["width"], box["y"] + (y + 0.5) / 480 * box["height"])
    wanted = segmenter.segment(PLAYGROUND, ["night sky", "brick", "green heart"])
    assert wanted.names[wanted.labels[y, x]] == "green heart"
    expect(page.locator("#tip-text")).to_have_text(f"green heart · {round(100 * wanted.confidence[y, x])} %")
    page.mouse.click(box["x"] + (x + 0.5) / 640 * box["width"], box["y"] + (y + 0.5) / 480 * box["height"])
    expect(page.get_by_role("heading", name="Why “green heart” here?")).to_be_visible()
    expect(page.locator("#inspect-place")).to_have_text(f"Pixel {x}, {y}")
    picture, why = page.locator("#stage").bounding_box(), page.locator("#inspect").bounding_box()
    assert why["x"] >= picture["x"] + picture["width"] and why["y"] <= picture["y"] + 1
    assert why["y"] + why["height"] < 900 and page.locator("#word-input-a").bounding_box()["y"] < 850
    expect(page.locator("#best-words .name").first).to_have_text("green heart")
    page.locator("#proposals button").first.hover()
    expect(page.locator("#mask")).to_be_visible()
    page.get_by_label("Close this explanation").click()
    expect(page.locator("#inspect")).to_be_hidden()
    expect(page.locator("#mask")).to_be_hidden()


def test_the_part_under_the_pointer_has_a_line_around_it(page, segmenter):
    open_picture(page)
    words_of(page, "night sky, brick, green heart, ")
    settled(page)
    box = page.locator("#pointing").bounding_box()
    labels = segmenter.segment(PLAYGROUND, ["night sky", "brick", "green heart"]).labels
    for x, y in ((380, 80), (320, 20)):
        page.mouse.move(box["x"] + (x + 0.5) / 640 * box["width"], box["y"] + (y + 0.5) / 480 * box["height"])
        expect(page.locator("#object")).to_be_visible()
        _, _, data = page.evaluate('document.getElementById("object").toDataURL()').partition(",")
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        light = (drawn[:, :, 3] == 255) & (drawn[:, :, 0] == 255)
        parts, _ = ndimage.label(labels == labels[y, x], np.ones((3, 3)))
        part = ndimage.binary_dilation(parts == parts[y, x], iterations=3)
        assert light.sum() > 50 and part[light].mean() > 0.97
        inner = ndimage.binary_erosion(parts == parts[y, x], iterations=7)
        assert light[inner].mean() < 0.02
    page.mouse.move(5, 5)
    expect(page.locator("#object")).to_be_hidden()


def test_pasted_lists_become_words(page):
    open_picture(page)
    paste = """text => {
      const data = new DataTransfer();
      data.setData("text", text);
      document.querySelector("#word-input-a").dispatchEvent(
        new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
    }"""
    for text in ('["night sky", "grass, dry"]', "brick; white moon", "water、sand\nsnow"):
        page.evaluate(paste, text)
    names = page.locator(".chip .name")
    expect(names).to_have_text(["night sky", "grass, dry", "brick", "white moon", "water", "sand", "snow"])


def test_two_vocabularies_side_by_side(page, segmenter):
    open_picture(page)
    words_of(page, "night sky, brick, ")
    page.get_by_label("Compare two vocabularies").check()
    expect(page.locator("#word-input-b")).to_be_focused()
    page.keyboard.type("water, orange circle,")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(4)
    split = page.get_by_role("slider", name="Border between A and B")
    split.press("ArrowLeft")
    expect(split).to_have_attribute("aria-valuenow", "48")
    border = page.locator("#split").bounding_box()
    middle = border["x"] + border["width"] / 2
    for side, beyond in (("a", lambda box: box["x"] + box["width"] - middle), ("b", lambda box: middle - box["x"])):
        names = page.locator(f"#names-{side} span")
        expect(names.first).to_be_visible()
        for _ in range(50):  # names are placed again a moment after the border has moved
            boxes = [name.bounding_box() for name in names.all()]
            if boxes and all(box and beyond(box) <= 2 for box in boxes):
                break
            page.wait_for_timeout(100)
        else:
            pytest.fail(f"side {side}: a name lies beyond the border: {boxes}")
    box = page.locator("#pointing").bounding_box()
    other = segmenter.segment(PLAYGROUND, ["water", "orange circle"])
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + box["height"] * 0.625)
    expect(page.locator("#tip-text")).to_contain_text(other.names[other.labels[300, 480]])
    first = segmenter.segment(PLAYGROUND, ["night sky", "brick"])
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + box["height"] * 0.95)
    expect(page.locator("#tip-text")).to_contain_text(first.names[first.labels[456, 160]])


def test_everything_by_keyboard(page):
    def focused(selector: str) -> None:
        expect(page.locator(selector)).to_be_focused()
        style = page.locator(selector).evaluate("(e) => { const s = getComputedStyle(e); return s.outlineStyle; }")
        ring = page.locator(selector).evaluate("(e) => getComputedStyle(e.parentElement).boxShadow")
        assert style == "solid" or ring != "none"

    page.keyboard.press("Tab")
    focused(".skip")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.get_by_role("button", name="playground", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(7)
    page.keyboard.press("/")
    focused("#word-input-a")
    page.keyboard.press("Backspace")
    expect(page.locator(".chip")).to_have_count(6)
    page.keyboard.type("white moon")
    page.keyboard.press("Enter")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(7)
    page.keyboard.press("Tab")
    focused(".chip:first-child .body")
    page.keyboard.press("Space")
    expect(page.locator(".chip .body").first).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("ArrowRight")
    focused(".chip:nth-child(2) .body")
    removed = page.locator(".chip .name").nth(1).text_content()
    page.keyboard.press("Delete")
    expect(page.locator(".chip .name").nth(1)).not_to_have_text(removed)
    expect(page.locator(".chip")).to_have_count(6)
    page.keyboard.press("p")
    focused("#pointing")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#cross")).to_be_visible()
    expect(page.locator("#spoken")).to_contain_text("at 320, 229")
    page.keyboard.press("Enter")
    expect(page.locator("#inspect-place")).to_have_text("Pixel 320, 229")
    page.keyboard.press("Escape")
    expect(page.locator("#inspect")).to_be_hidden()
    page.keyboard.press("]")
    expect(page.locator("#opacity")).to_have_value("70")
    page.keyboard.press("c")
    expect(page.locator("#compare")).to_be_checked()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})

    def fits() -> bool:
        return page.evaluate("() => document.documentElement.scrollWidth") <= 360

    assert fits()
    open_picture(page)
    words_of(page, f"night sky, brick|{'very' * 20}, {'long' * 30}, ")
    settled(page)
    assert fits()
    page.locator("#pointing").click(position={"x": 100, "y": 100})
    expect(page.locator("#inspect")).to_be_visible()
    page.get_by_label("Compare two vocabularies").check()
    assert fits()


def test_what_is_typed_is_text(page):
    open_picture(page)
    evil = "<img src=x onerror=alert(1)>"
    words_of(page, f"{evil}, brick, ")
    expect(page.locator(".chip .name").first).to_have_text(evil)
    settled(page)
    page.locator("#pointing").click(position={"x": 5, "y": 5})
    expect(page.locator("#best-words .name")).to_have_count(2)
    assert page.locator(".panel img, .inspect img").count() == 0


def test_problems_are_told_in_words_and_pass(page, complaints, tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("not a picture")
    page.set_input_files("#file", bad)
    expect(page.locator("#problem")).to_contain_text("notes.png is not a picture")
    large = tmp_path / "large.png"
    large.write_bytes(PLAYGROUND.read_bytes() + bytes(21 << 20))
    page.set_input_files("#file", large)
    expect(page.locator("#problem")).to_contain_text("large.png has 22.4 MB; this service takes at most 21.0 MB")
    open_picture(page)
    expect(page.locator("#problem")).to_be_hidden()
    assert complaints == []
    words_of(page, f"brick, {'long ' * 100}")
    expect(page.locator(".side .wrong").first).to_contain_text("shorten the word")
    words_of(page, "night sky")
    expect(page.locator(".side .wrong").first).to_be_hidden()
    complaints.clear()  # the browser notes the 422


def test_a_service_that_forgot_or_went_is_found_again(page, service, complaints):
    names = []
    page.on("response", lambda response: response.status == 201 and names.append(response.headers["location"]))
    open_picture(page)
    words_of(page, "brick, ")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(1)
    page.wait_for_timeout(1000)
    urllib.request.urlopen(urllib.request.Request(f"{service.url}{names[0]}", method="DELETE")).close()
    words_of(page, "night sky, ")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(2)
    assert len(names) == 2
    page.wait_for_timeout(1000)

    assert service.stop() == 130
    words_of(page, "green heart, ")
    expect(page.locator("#problem")).to_contain_text("does not answer")
    service.start()
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator(".chip .share", has_text="%")).to_have_count(3)
    complaints.clear()  # the browser notes what failed


def test_the_page_takes_nothing_from_outside(service):
    with urllib.request.urlopen(service.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
        html = answer.read().decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', html)
    for place in re.findall(r'(?:src|href)="(?!#)([^"]*)"', html):
        assert re.fullmatch(r"[a-z]+\.(js|css|svg)", place)
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=", html)


def test_other_host_names_are_refused(service):
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(service.url, headers={"Host": "evil.example"}))
    assert refused.value.code == 421
    refused.value.close()


def colours_of(page: Page, side: int) -> dict[str, str]:
    """The colours of a side's words, read at once, since words change places at a pause."""
    return (
        page.locator(".side")
        .nth(side)
        .evaluate("""(side) => Object.fromEntries(
      [...side.querySelectorAll(".chip")].map((chip) =>
        [chip.querySelector(".name").textContent, chip.querySelector(".swatch").style.backgroundColor]))""")
    )


def test_a_word_has_one_colour_on_both_sides_and_in_what_is_downloaded(page, segmenter):
    open_picture(page)
    words_of(page, "night sky, brick, ")
    page.get_by_label("Compare two vocabularies").check()
    page.keyboard.type("green heart, brick,")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(4)
    of_a, of_b = colours_of(page, 0), colours_of(page, 1)
    assert of_a["brick"] == of_b["brick"] == "rgb(0, 114, 178)"
    assert of_b["green heart"] == "rgb(0, 158, 115)"
    with page.expect_download() as a, page.expect_download(lambda each: ".b." in each.suggested_filename) as b:
        page.get_by_role("button", name="Overlay", exact=True).click()
    assert a.value.suggested_filename == "playground.a.overlay.png"
    shown = np.asarray(Image.open(b.value.path()))
    result = segmenter.segment(PLAYGROUND, ["green heart", "brick"])
    wanted = overlay_of(result.image, result.labels, result.names, result.areas, palette(3)[[2, 1]])
    assert (shown == np.asarray(wanted)).all()


def test_regions_have_names_and_the_palette_changes(page):
    open_picture(page)
    words_of(page, "night sky, brick, ")
    settled(page)
    names = page.locator("#names-a span")
    expect(names.first).to_be_visible()
    assert set(names.all_text_contents()) == {"night sky", "brick"}
    page.get_by_label("Colours").select_option("vivid")
    first = page.locator(".chip", has_text="night sky")
    expect(first.locator(".swatch")).to_have_css("background-color", "rgb(230, 25, 75)")
    shown = overlay(page)
    colours = {tuple(colour) for colour in shown[shown[..., 3] == 255][:, :3].tolist()}
    assert colours <= {(230, 25, 75), (0, 130, 245), (32, 32, 32)}
    page.locator(".chip .body", has_text="night sky").click()
    expect(names.filter(has_text="night sky")).to_have_count(0)


def test_names_stand_where_the_package_writes_them(page):
    rows, columns = np.mgrid[0:300, 0:400]
    labels = np.where((rows - 150) ** 2 + (columns - 200) ** 2 < 100**2, 2, (columns > 170).astype(int))
    labels[10:14, 10:14] = 2  # too small for a name
    found = page.evaluate(
        """async ([labels, width, height]) => {
          const { namePlaces } = await import("/regions.js");
          return namePlaces(Uint8Array.from(labels), width, height, (label) => label < 255);
        }""",
        [labels.ravel().tolist(), 400, 300],
    )
    wanted = name_places(labels)
    assert [place["label"] for place in found] == [place.label for place in wanted] == [1, 0, 2]
    for place, other in zip(found, wanted, strict=True):
        assert place["radius"] == pytest.approx(other.radius, rel=0.1)
        assert labels[int(place["y"]), int(place["x"])] == place["label"]


def test_an_unsure_model_gives_no_black_specks(page):
    """Labels that change at every pixel, as in noise, get no outlines; a border between two regions does."""
    page.evaluate("""async () => {
      const { withoutCrowds } = await import("/regions.js");
      const [width, height] = [60, 40];
      const noise = Uint8Array.from({ length: width * height }, (_, at) => (at * 7919) % 3 > 0);
      const inner = (at) => at % width > 7 && at % width < width - 8 && at > 8 * width && at < (height - 8) * width;
      if (withoutCrowds(noise, width, height).some((each, at) => each && inner(at))) throw new Error("specks");
      const border = Uint8Array.from({ length: width * height }, (_, at) => at % width === 30);
      const kept = withoutCrowds(border, width, height);
      if (kept.some((each, at) => each !== border[at])) throw new Error("no border");
    }""")


def test_words_stand_by_their_share_and_unknown_and_repeated_ones_are_told(page, segmenter):
    open_picture(page)
    words_of(page, "green heart, zeppelin, brick|bricks, night sky, ")
    settled(page)
    page.mouse.move(1, 1)
    areas = segmenter.segment(PLAYGROUND, ["green heart", "zeppelin", "brick|bricks", "night sky"]).areas
    expect(page.locator(".chip .name")).to_have_text(sorted(areas, key=lambda name: -areas[name]))
    expect(page.locator(".chip.unseen .name")).to_have_text("zeppelin")
    expect(page.locator(".never").first).to_contain_text("never read “zeppelin”")
    page.locator("#word-input-a").press_sequentially("bricks")
    expect(page.locator(".repeats").first).to_have_text("“bricks” repeats a synonym of “brick”.")
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_count(4)
    page.keyboard.type("tile|tile")
    expect(page.locator(".repeats").first).to_contain_text("stands twice")
    page.keyboard.press("Backspace")
    expect(page.locator(".repeats").first).to_be_hidden()


def test_example_words_and_plain_labels(page):
    open_picture(page)
    expect(page.locator("#word-input-a")).to_have_attribute("placeholder", re.compile("sky, road"))
    examples = page.locator(".examples").first
    expect(examples.get_by_role("button")).to_have_count(3)
    examples.get_by_role("button", name="of the playground").click()
    expect(page.locator(".chip .share", has_text="%")).to_have_count(7)
    expect(examples).to_be_hidden()
    expect(page.locator("#time")).to_have_text(re.compile(r"^updated in \d+ ms$"))


@pytest.mark.parametrize("size", [(640, 400), (640, 450), (512, 384)])
def test_magnified_to_200_percent_the_words_and_the_picture_are_seen_together(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    open_picture(page)
    words_of(page, "night sky, brick, ")
    settled(page)

    def seen(selector: str) -> bool:
        box = page.locator(selector).bounding_box()
        return box["y"] >= 0 and box["y"] + box["height"] <= size[1]

    page.evaluate("() => scrollTo(0, 0)")
    assert seen("#word-input-a") and seen("#frame")
    page.locator("#pointing").click(position={"x": 40, "y": 40})
    expect(page.locator("#inspect")).to_be_visible()
    assert seen("#word-input-a")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]
