"""How commands are asked where, and how exactly, to compute."""

from enum import StrEnum
from typing import Annotated, Literal

import typer


class Speed(StrEnum):
    """How the image half is computed."""

    exact = "exact"
    fast = "fast"


class Dtype(StrEnum):
    """What the image half computes with."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def dtype_name(dtype: Dtype | None) -> Literal["float32", "bfloat16"] | None:
    """Return the choice as `opensan.load` takes it."""
    return None if dtype is None else dtype.value


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
SpeedAsForSegment = Annotated[Speed, typer.Option(help="As for `opensan segment`.")]
ImageDtype = Annotated[
    Dtype | None, typer.Option(help="Of the image half's matrices; --speed chooses it if not given.")
]
