"""`opensan demo`: label a photograph that comes with the package, by the model that comes with it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from opensan.cli.asked_words import Words
from opensan.cli.options import Out, Show
from opensan.cli.segment import segment
from opensan.files import ASSETS

PHOTOGRAPHS = ASSETS / "photographs"

WORDS = {
    "street": "sky, road, tree, bicycle",
    "room": "wall, monitor, desk",
    "animal": "ocean, horse",
    "food": "hot dog, snow",
}
"""Photograph -> the words that it is labelled with if none are given."""


def demo(
    photograph: Annotated[
        Literal["street", "room", "animal", "food"], typer.Argument(help="The photograph to label.")
    ] = "street",
    words: Words = None,
    out: Out = Path("out/demo"),
    show: Show = False,
) -> None:
    """Label a photograph that comes with the package, without a network, and say where the picture is.

    The model is `photo`, a small one that comes with the package too; it finds shapes better than names, and the
    authors' models (`opensan segment`) are far better at both. Who made the photographs is written beside them.
    """
    segment([PHOTOGRAPHS / f"{photograph}.jpg"], words=words or [WORDS[photograph]], model="photo", out=out, show=show)
