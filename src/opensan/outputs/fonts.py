"""Find fonts on this machine for words in any script."""

import functools
import os
import sys
import unicodedata
from pathlib import Path

from PIL import ImageFont

# The first font is tried for every text; the others, and then all installed fonts, only when a text has characters
# that the earlier ones lack.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
)

_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "condensed", "serif")
"""Fonts with one of these in their names are tried last."""

_BOXES = ("lastresort", "adobeblank", "notdef")
"""Fonts that claim to have every character, but draw a box."""

_SUFFIXES = {".ttf", ".ttc", ".otf", ".otc"}

_PROBE_LETTERS = 20
"""The size at which fonts are asked for their characters. Fonts of one fixed size (colour emoji) do not open at it."""


def font_for(text: str, letters: int) -> ImageFont.FreeTypeFont:
    """Return the first font on this machine that has all characters of `text`, else the one that has most of them."""
    return _font(_best(text), letters) or _built_in_font(letters)


def readable(text: str) -> str:
    """Return `text` on one line, with replacements for characters without a glyph: "e", "automobile", "U+8DEF"."""
    best = _best(text)
    return " ".join("".join(_or_description(character, best) for character in text).split())


def shortened(text: str, width: int, letters: int) -> str:
    """Return `text`, or as much of it as fits into `width` pixels, with an ellipsis."""
    if text_width(text, letters) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_width(text[:middle] + "…", letters) <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "…"


def text_width(text: str, letters: int) -> float:
    """Return the width of `text` in pixels."""
    return font_for(text, letters).getlength(text)


def _or_description(character: str, font: str) -> str:
    if character.isspace() or _has(font, character):
        return character
    letter = unicodedata.normalize("NFD", character)[0]
    if _has(font, letter):  # the letter without its accent
        return letter
    name = unicodedata.name(character, "")
    if unicodedata.category(character) == "Cf" or name.startswith("VARIATION SELECTOR"):
        return ""  # a format character, which has no glyph of its own
    return f" {name.lower()} " if unicodedata.category(character) == "So" else f" U+{ord(character):04X} "


def _best(text: str) -> str:
    """Return the name or path of the best font; "" for Pillow's own."""
    characters = {character for character in text if not character.isspace()}
    first = next((name for name in _FONTS if _font(name, _PROBE_LETTERS)), "")
    if text.isascii():
        return first
    best, most = first, -1
    for name in dict.fromkeys([first, *_FONTS, *_installed()]):
        count = sum(_has(name, character) for character in characters)
        if count == len(characters):
            return name
        if count > most:
            best, most = name, count
    return best


@functools.cache
def _installed() -> list[str]:
    """Return all fonts of this machine, regular styles first."""
    paths = {path for folder in _folders() for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES}
    names = {path: path.stem.lower() for path in paths}
    plain = [path for path in paths if not any(box in names[path] for box in _BOXES)]
    plain.sort(key=lambda path: (any(style in names[path] for style in _STYLES), names[path], path))
    return list(map(str, plain))


def _folders() -> list[Path]:
    """Return the folders in which the system and the user keep fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft", "Windows", "Fonts")]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    return [Path(folder, "fonts") for folder in (*shared.split(":"), own)] + [home / ".fonts"]


@functools.cache
def _font(name: str, letters: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, letters, layout_engine=layout) if name else None
    except OSError:
        return None


@functools.cache
def _built_in_font(letters: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, which has little more than ASCII."""
    font = ImageFont.load_default(letters)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow is built with FreeType
    return font


@functools.cache
def _has(name: str, character: str) -> bool:
    """Return whether the font draws `character` differently from a character that no font has."""
    # Better layouts add a circle to an accent that stands alone, even to a missing one.
    font = _font(name, _PROBE_LETTERS, ImageFont.Layout.BASIC) if name else _built_in_font(_PROBE_LETTERS)
    if font is None:
        return False
    drawn, missing = font.getmask(character), font.getmask("\U0010ffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
