"""Write an answer as one HTML file: the images with their matching regions, best first.

The pictures are in the file itself; it has no scripts and loads nothing, so it can be sent to somebody as it is.
"""

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.files import write_text
from opensan.images import ImageError, open_image
from opensan.index.answers import Answer, Match
from opensan.outputs.drawing import NO_IMAGE, jpeg_url, muted

LONG_SIDE = 400
"""Longest side of the pictures, in pixels."""

OUTLINE = (230, 25, 75)
"""Colour around the regions."""

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; background: #fff; margin: 2rem auto; max-width: 1700px;
  padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } .about { color: #595959; margin: 0 0 1.5rem; overflow-wrap: anywhere }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1.4rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
figure { margin: 0 } figure img { width: 100%; height: 13rem; object-fit: contain; display: block; background: #efefef }
figcaption { margin-top: .3rem; overflow-wrap: anywhere } b { font-variant-numeric: tabular-nums }
.figures { color: #595959; display: block; font-variant-numeric: tabular-nums }
"""


def write_page(path: Path, answer: Answer, *, max_pixels: int) -> list[str]:
    """Write the page, with pictures of the images that can still be read.

    Returns a line for each that can't: its regions are shown on grey.
    """
    problems: list[str] = []
    items = []
    for match in answer.matches:
        picture, problem = drawn_match(match, max_pixels=max_pixels)
        problems += [problem] if problem else []
        items.append(_item(match, picture))
    question = answer.question
    asked = "".join(f", and {word}" for word in question["and"]) + "".join(f", not {w}" for w in question["not"])
    title = f"{question['search']}{asked}"
    looked = "the likely ones of " if answer.approximate else ""
    about = (
        f"{len(answer)} of {looked}{answer.images:,} images, by {question['by']}, against {question['against']:,} "
        "contrast words. Scores order the images; they are not calibrated."
    )
    body = "\n".join(items)
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="about">{escape(about)}</p>\n<ol>\n{body}\n</ol>\n</main>\n</html>\n',
    )
    return problems


def drawn_match(match: Match, *, max_pixels: int) -> tuple[np.ndarray, str | None]:
    """Draw an image, reduced, in colour inside its regions and pale outside: [h, w, 3] uint8.

    Where it can't be read any more, the regions are drawn on grey, and the reason, one line, is returned too.
    """
    problem = None
    try:
        pixels: np.ndarray | None = open_image(match.path, max_pixels=max_pixels)
        if pixels is not None and pixels.shape[:2] != match.size:
            problem = f"{match.path}: has changed since it was added to the index; add it again"
            pixels = None
    except (ImageError, OSError) as error:
        pixels, problem = None, str(error)
    return _picture(match, pixels), problem


def _item(match: Match, picture: np.ndarray) -> str:
    """Return an image with its regions as an item of the list."""
    name = Path(match.path).name
    count = len(match.regions)
    best = match.regions[0]
    regions = f"{count} region{'s' if count > 1 else ''}, best {best.probability:.2f}"
    more = f'<span class="figures">also: {escape(", ".join(match.same))}</span>' if match.same else ""
    return (
        f'<li><figure><img src="{jpeg_url(picture)}" alt="{escape(name, quote=True)}" width="{picture.shape[1]}" '
        f'height="{picture.shape[0]}"><figcaption title="{escape(match.path, quote=True)}"><b>{match.score:.3f}</b> '
        f'{escape(name)}<span class="figures">{regions}</span>{more}</figcaption></figure></li>'
    )


def _picture(match: Match, pixels: np.ndarray | None) -> np.ndarray:
    """Draw an image, reduced, in colour inside its regions and pale outside: [h, w, 3] uint8."""
    height, width = match.size
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = np.zeros((height, width), dtype=bool)
    for region in match.regions:
        shown |= region.mask
    inside = np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.NEAREST))
    if pixels is None:
        small = np.full((*inside.shape, 3), NO_IMAGE, dtype=np.uint8)
    else:
        small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0))
    drawn = np.where(inside[..., None], small, muted(small)[..., None])
    drawn[_edge(inside)] = OUTLINE
    return drawn


def _edge(inside: np.ndarray) -> np.ndarray:
    """Return the pixels outside regions [h, w] bool that lie beside them, two pixels wide."""
    from scipy import ndimage  # here, so that the package imports quickly

    return ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=2) & ~inside
