"""Options of commands for device, speed and precision."""

from enum import StrEnum
from typing import Annotated, Literal

import typer


class Speed(StrEnum):
    """Speed of the image half."""

    exact = "exact"
    fast = "fast"


class Dtype(StrEnum):
    """Precision of the image half's matrices."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def dtype_name(dtype: Dtype | None) -> Literal["float32", "bfloat16"] | None:
    """Return the choice as `opensan.load` takes it."""
    return None if dtype is None else dtype.value


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
SpeedAsForSegment = Annotated[Speed, typer.Option(help="As for `opensan segment`.")]
ImageDtype = Annotated[
    Dtype | None, typer.Option(help="Precision of the image half's matrices; --speed chooses it if not given.")
]
