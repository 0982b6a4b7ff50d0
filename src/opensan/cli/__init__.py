"""The `opensan` command.

Nothing here imports torch before a command needs it, so that `--help` answers at once.
"""

import atexit
import gc
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from opensan import __version__
from opensan.cli.adapt import adapt
from opensan.cli.cache import cache
from opensan.cli.calibrate import calibrate
from opensan.cli.data import data
from opensan.cli.demo import demo
from opensan.cli.evaluate import evaluate
from opensan.cli.export import export
from opensan.cli.index import index
from opensan.cli.lab import lab
from opensan.cli.models import convert, models, parity, push
from opensan.cli.profile import profile
from opensan.cli.raster import segment_raster
from opensan.cli.segment import segment
from opensan.cli.serve import serve
from opensan.cli.similarity import similarity
from opensan.cli.terminal import Command, Commands, reporting_errors
from opensan.cli.train import train
from opensan.cli.tune import tune
from opensan.cli.ui import ui
from opensan.cli.video import segment_video
from opensan.cli.words import words

app = typer.Typer(
    name="opensan",
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(demo)
app.command(cls=Command)(segment)
app.command(cls=Command)(segment_raster)
app.command(cls=Command)(segment_video)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(calibrate)
app.command(cls=Command)(words)
app.command(cls=Command)(similarity)
app.command(cls=Command)(cache)
app.command(cls=Command)(models)
app.command(cls=Command)(convert)
app.command(cls=Command)(push)
app.command(cls=Command)(export)
app.command(cls=Command)(parity)
app.command(cls=Command)(train)
app.command(cls=Command)(adapt)
app.command(cls=Command)(profile)
app.command(cls=Command)(serve)
app.command(cls=Command)(ui)
app.add_typer(data)
app.add_typer(index)
app.add_typer(tune)
app.add_typer(lab)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"opensan {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Label every pixel of an image with words that you choose."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (default: this process's) and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    atexit.register(gc.freeze)  # so that the interpreter does not search all of torch for garbage before it ends
    with reporting_errors():
        sys.exit(app(arguments, prog_name="opensan", standalone_mode=False))
