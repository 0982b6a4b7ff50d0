"""`opensan convert` and `opensan parity`: convert official weights, and compare with the official code's results."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.cli.terminal import note
from opensan.errors import UserError


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.pth", help="An official checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
) -> None:
    """Convert official weights to safetensors.

    Writes model.safetensors and config.json to a folder that --model takes. The file is read as weights only:
    nothing that a pickle may ask for is executed.
    """
    for name in ("model.safetensors", "config.json"):
        if (out / name).exists():
            raise UserError(f"{out / name} exists already: choose another folder, or move it away")
    from opensan.outputs import check_writable

    check_writable(out)
    note(f"reading {checkpoint}")
    from opensan.checkpoints import load_official, save_folder

    model = load_official(checkpoint)
    save_folder(model, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {model.config.name}, {parameters:,} parameters")
    print(f'use it with: opensan segment IMAGE --words "..." --model {out}')


def parity(
    goldens: Annotated[list[Path], typer.Argument(metavar="FILE.npz...", help="Recorded results.", show_default=False)],
) -> None:
    """Compare with the official code's results.

    The files hold what the official code computed with weights filled by a rule. Prints the largest difference of
    each tensor; exit code 1 if one is above its limit.
    """
    for path in goldens:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    from opensan.parity.inference import run

    if not run(goldens):
        raise typer.Exit(1)
