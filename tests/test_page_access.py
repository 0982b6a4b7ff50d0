"""The web page for everybody: axe finds nothing in any state, and targets and edges are large and clear enough."""

import pytest

pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")

from axe_playwright_python.sync_playwright import Axe

from .browsing import (  # noqa: F401
    browser,
    complaints,
    expect,
    open_picture,
    page,
    service,
    settled,
    words_of,
)

# ruff: noqa: F811

SIZES = {"desktop": (1280, 900), "phone": (390, 780), "200 %": (640, 450)}
RULES = {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}  # WCAG 2.2: targets of 24 px

EDGES = """() => {
  const channel = (level) => level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  const brightness = (colour) => {
    const [red, green, blue, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
    if (!alpha) return null;
    return 0.2126 * channel(red / 255) + 0.7152 * channel(green / 255) + 0.0722 * channel(blue / 255);
  };
  const behind = (element) => {
    for (let each = element.parentElement; each; each = each.parentElement) {
      const found = brightness(getComputedStyle(each).backgroundColor);
      if (found !== null) return found;
    }
  };
  return [...document.querySelectorAll(".entry, select, .buttons button, #link, .scenes button")]
    .filter((element) => element.offsetParent && !element.disabled)
    .map((element) => {
      const [edge, ground] = [brightness(getComputedStyle(element).borderTopColor), behind(element)];
      const contrast = (Math.max(edge, ground) + 0.05) / (Math.min(edge, ground) + 0.05);
      return [element.textContent.trim() || element.className, contrast];
    })
    .filter(([, contrast]) => contrast < 3);
}"""
"""Controls whose edges have less than WCAG's 3:1 of contrast with what lies behind them."""


def violations(page, state: str) -> list[str]:
    found = Axe().run(page, options=RULES).response["violations"]
    told = [
        f"{state}: {each['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for each in found
        for node in each["nodes"]
    ]
    return told + [f"{state}: edge of {name!r} has {contrast:.2f}:1" for name, contrast in page.evaluate(EDGES)]


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("desktop", "light"),
        ("desktop", "dark"),
        ("phone", "light"),
        ("phone", "dark"),
        ("200 %", "light"),
        ("200 %", "dark"),
    ],
)
def test_axe_finds_nothing(page, complaints, tmp_path, size, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    found = violations(page, "empty")
    open_picture(page)
    found += violations(page, "picture without words")
    words_of(page, "night sky, zeppelin, brick|tiles, brick")
    settled(page)
    expect(page.locator(".repeats").first).to_be_visible()
    found += violations(page, "picture labelled")
    page.locator("#pointing").click(position={"x": 40, "y": 40})
    expect(page.locator("#inspect")).to_be_visible()
    found += violations(page, "explanation")
    page.locator("#inspect-close").click()
    page.get_by_label("Compare two vocabularies").check()
    page.keyboard.type("green heart, water,")
    expect(page.locator(".chip .share", has_text="%")).to_have_count(5)
    found += violations(page, "compare")
    (tmp_path / "notes.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    expect(page.locator("#problem")).to_be_visible()
    found += violations(page, "error")
    page.locator(".tools [data-do=camera]").click()
    expect(page.locator("#time")).to_contain_text("frames a second")
    found += violations(page, "camera")
    page.locator("#help-button").click()
    found += violations(page, "help")
    assert not found, "\n".join(found)
