"""Options that several commands share: one spelling, one help."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from opensan.choices import Adapt, Dtype, Speed
from opensan.cli.terminal import UsageError, note
from opensan.files import ASSETS


def starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    """Return the names that the shell offers to complete a word."""
    return [name for name in names if name.startswith(incomplete)]


MODELS = ("photo", "tiny", "san-vit-b16", "san-vit-l14")
"""The models that label images by name; typed here because the shell must not wait for torch."""

DRAWN_SCENES = ASSETS / "scenes"


def say_what_tiny_knows(model: str, images: Iterable[Path]) -> None:
    """Say on a terminal that `tiny` knows drawn scenes only, unless all of `images` are the package's scenes."""
    if model == "tiny" and any(image.absolute().parent != DRAWN_SCENES for image in images):
        note("tiny knows drawn scenes only: for photographs, give --model photo or --model san-vit-b16")


MODEL, RESULTS = "Model", "Results"
"""Groups of options in the help."""

_model_option = typer.Option(
    "--model",
    "-m",
    autocompletion=lambda incomplete: starting_with(incomplete, MODELS),
    help="san-vit-b16, san-vit-l14 (official weights, downloaded once), photo, tiny (come along, work offline; "
    "tiny knows drawn scenes only), a folder, a .safetensors, an official .pth, or a hub id owner/name. "
    "maskclip:MODEL, two-stage:MODEL, mask-tokens:MODEL: other methods on its weights.",
    rich_help_panel=MODEL,
)
Model = Annotated[str, _model_option]
ModelOnDisk = Annotated[str | None, _model_option]
"""None: the official weights if they are on disk, else `photo`."""
SearchedIndex = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="An index made by the same model (opensan index add), whose images can be searched.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="auto (cuda where it works, else cpu), cpu, cuda, cuda:1, mps.", rich_help_panel=MODEL),
]
SpeedChoice = Annotated[
    Speed,
    typer.Option(
        help="exact is the benchmarks' protocol; where the processor has bfloat16, fast takes three quarters of its "
        "time for nearly the same labels, and fastest half or more, with more changes.",
        rich_help_panel=MODEL,
    ),
]
ImageDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="Precision of the image half's matrices; --speed chooses it if not given.", rich_help_panel=MODEL
    ),
]
Adapting = Annotated[
    Adapt | None,
    typer.Option(
        "--adapt",
        help="Adapt the norm layers to each image first, without labels, until the model is surer of the words: from "
        "its own weights for each image, or keep those of the image before. Takes 5 to 7 times as long.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="The folder for the results.", rich_help_panel=RESULTS)
]
Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Make confidences probabilities, by a file of `opensan calibrate`. Default: calibration.json in the "
        "model's folder, if it is there.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Threshold = Annotated[
    float,
    typer.Option(
        help="Leave pixels of less confidence unlabelled, from 0 to 1.", show_default=False, rich_help_panel=RESULTS
    ),
]


def listed_formats(given: Iterable[str]) -> list[str]:
    """Return the formats of --format, each of whose values is one format or a list with commas."""
    return [kind.strip() for kind in ",".join(given).split(",") if kind.strip()]


def checked_threshold(value: float) -> float:
    """Return the value of --threshold. Raises UsageError, one line, unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"--threshold {value:g}: must be from 0 to 1")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=RESULTS)]
Show = Annotated[bool, typer.Option("--show", help="Open the result when it is done.", rich_help_panel=RESULTS)]
