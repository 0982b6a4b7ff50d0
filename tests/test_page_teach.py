"""Teaching words by marks on the picture: the web page's part."""

import base64
import io
import json

import numpy as np
from PIL import Image

import opensan

from .browsing import (  # noqa: F401
    PLAYGROUND,
    Page,
    browser,
    complaints,
    expect,
    open_picture,
    page,
    segmenter,
    service,
    settled,
    words_of,
)

# ruff: noqa: F811

WORDS = ["night sky", "brick", "sand"]


def position(page: Page, x: int, y: int) -> dict[str, float]:
    box = page.locator("#pointing").bounding_box()
    assert box is not None
    return {"x": (x + 0.5) * box["width"] / 640, "y": (y + 0.5) * box["height"] / 480}


def click(page: Page, x: int, y: int) -> None:
    page.locator("#pointing").click(position=position(page, x, y))


def draw(page: Page, *places: tuple[int, int]) -> None:
    box = page.locator("#pointing").bounding_box()
    assert box is not None
    points = [position(page, x, y) for x, y in places]
    first, *others = [(box["x"] + point["x"], box["y"] + point["y"]) for point in points]
    page.mouse.move(*first)
    page.mouse.down()
    for place in others:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def saved(page: Page, button: str) -> tuple[str, object]:
    with page.expect_download() as downloading:
        page.get_by_role("button", name=button, exact=True).click()
    return downloading.value.suggested_filename, json.loads(downloading.value.path().read_text("utf-8"))


def marked_pixels(page: Page) -> int:
    address = page.evaluate("() => document.querySelector('#marks').toDataURL()")
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return int((np.asarray(picture)[..., 3] > 0).sum())


def test_words_are_taught_saved_kept_and_given_up(page, segmenter):
    open_picture(page)
    words_of(page, ", ".join(WORDS) + ", ")
    settled(page)
    before = segmenter.segment(PLAYGROUND, WORDS).labels
    brick = [(int(x), int(y)) for y, x in np.argwhere(before == 1)[:: (before == 1).sum() // 4][:4]]
    sky = [(int(x), int(y)) for y, x in np.argwhere(before == 0)[:: (before == 0).sum() // 4][:4]]
    page.get_by_label("Teach words by marks on the picture").check()
    expect(page.locator("#learn")).to_be_disabled()
    page.locator("#teach-word").select_option("sand")  # what the model calls brick
    for place in brick:
        click(page, *place)
    expect(page.locator("#teach-status")).to_contain_text("choose another word")
    assert page.locator("#inspect").is_hidden()
    page.locator("#teach-word").select_option("night sky")
    draw(page, *sky[1:3])
    assert marked_pixels(page) > 50
    page.locator("#learn").click()
    expect(page.locator("#teach-status")).to_contain_text("Learnt from")

    name, words = saved(page, "Download words")
    assert name == "words.json" and words["words"] == WORDS and set(words["tuned"]["rows"]) == {"sand", "night sky"}
    taught = segmenter.segment(PLAYGROUND, opensan.Vocabulary.parse(words)).labels
    assert (taught[before == 1] == 2).mean() > 0.5 > (before[before == 1] == 2).mean()
    x, y = next((x, y) for x, y in brick if taught[y, x] == 2)
    page.locator("#pointing").hover(position=position(page, x, y))
    expect(page.locator("#tip")).to_contain_text("sand")

    name, marks = saved(page, "Download marks")
    assert name == "points.json" and {entry["image"] for entry in marks} == {"playground.png"}
    assert [entry["word"] for entry in marks] == ["sand"] * 4 + ["night sky"]
    assert "points" in marks[0] and len(marks[-1]["scribble"]) > 2

    page.reload()
    expect(page.locator("#spoken")).to_contain_text("is open")
    expect(page.locator("#teach-status")).to_contain_text("as you taught them")
    page.get_by_label("Teach words by marks on the picture").check()
    expect(page.locator("#save-words")).to_be_enabled()
    assert marked_pixels(page) > 50
    page.locator("#pointing").hover(position=position(page, x, y))
    expect(page.locator("#tip")).to_contain_text("sand")
    page.get_by_role("button", name="Undo mark").click()
    page.get_by_role("button", name="Start over").click()
    expect(page.locator("#save-words")).to_be_disabled()
    assert marked_pixels(page) == 0
    page.locator("#pointing").hover(position=position(page, x, y))
    expect(page.locator("#tip")).to_contain_text("brick")


def test_a_lack_of_marks_is_told_and_keys_mark_too(page, complaints):
    open_picture(page)
    page.get_by_label("Teach words by marks on the picture").check()
    click(page, 30, 30)
    expect(page.locator("#teach-status")).to_contain_text("Type the words first")
    assert marked_pixels(page) == 0
    words_of(page, "brick, night sky, ")
    settled(page)
    page.locator("#pointing").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#inspect").is_hidden()
    page.locator("#learn").click()
    expect(page.locator("#teach-status")).to_contain_text("label some of another word too")
    assert len(complaints) == 1 and "422" in complaints.pop()
    page.get_by_label("Teach words by marks on the picture").uncheck()
    assert marked_pixels(page) == 0
    click(page, 30, 30)
    expect(page.locator("#inspect")).to_be_visible()


def test_what_was_learnt_is_given_up_with_the_model_and_pictures_beyond_the_limit_are_told(page):
    state = {"sides": [{"words": WORDS, "background": []}], "model": "another", "tuned": {"image": "x", "text": "y"}}
    page.evaluate("(state) => localStorage.setItem('opensan', JSON.stringify(state))", state)
    page.reload()
    expect(page.locator("#teach-status")).to_contain_text("learnt for another model")
    page.get_by_label("Teach words by marks on the picture").check()
    page.locator("#teach-word").select_option("sand")
    for _ in range(17):
        open_picture(page)
        expect(page.locator("#undo-mark")).to_be_disabled()  # the new picture has no marks yet
        expect(page.get_by_role("button", name="Label map")).to_be_enabled()  # and the model has looked at it
        click(page, 300, 300)
        expect(page.locator("#undo-mark")).to_be_enabled()
    expect(page.locator("#teach-status")).to_contain_text("those of playground.png are left out now")
