"""How commands are asked where, and how exactly, to compute."""

from enum import StrEnum
from typing import Annotated

import typer


class Speed(StrEnum):
    """How the image half is computed."""

    exact = "exact"
    fast = "fast"


class Dtype(StrEnum):
    """What the image half computes with."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
SpeedAsForSegment = Annotated[Speed, typer.Option(help="As for `opensan segment`.")]
ImageDtype = Annotated[
    Dtype | None, typer.Option(help="Of the image half's matrices; --speed chooses it if not given.")
]
