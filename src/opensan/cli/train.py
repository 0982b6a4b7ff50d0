"""`opensan train`: train a model by one configuration file."""

import os
import sys
from typing import Annotated

import typer

from opensan.cli.terminal import INTERRUPTED, UsageError
from opensan.errors import UserError


def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file, or a preset's name.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings in place of the file's.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the whole configuration, with what each setting means.")
    ] = False,
) -> None:
    """Train a model by a configuration.

    The same command continues a run that was stopped in any way. Presets are the official recipes:
    san-vit-b16 and san-vit-l14, at 32 images a step: loop.batch_size * loop.accumulate * processes. Several
    processes: torchrun --nproc-per-node 8 -m opensan train san-vit-b16 loop.batch_size=4
    """
    from opensan.recipe.config import RECIPES, read_recipe

    if config is None and not show:
        raise UsageError(f"give a configuration: a YAML file, or one of {', '.join(RECIPES)}")
    name = config or next(iter(RECIPES))
    recipe = read_recipe(name, overrides or [])
    if show:
        from opensan.recipe.show import to_yaml

        print(f"# {name} (presets: {', '.join(RECIPES)})")
        print(to_yaml(recipe), end="")
        return

    from torch import OutOfMemoryError

    from opensan.cli.training_bar import TrainingBar
    from opensan.recipe.run import run_recipe
    from opensan.train.loop import Diverged

    try:
        result, saved = run_recipe(recipe, TrainingBar() if sys.stderr.isatty() else None)
    except OutOfMemoryError:
        raise UserError(
            "out of memory: try a smaller loop.batch_size with more loop.accumulate, "
            "or loop.activation_checkpointing=true"
        ) from None
    except Diverged as error:
        raise UserError(str(error)) from None
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if saved is not None and os.environ.get("RANK", "0") == "0":  # only torchrun's main process prints
        best = "" if result.best is None else f", best mIoU {100 * result.best:.2f} % after step {saved.step}"
        print(f"{recipe.out}: {result.step} steps{best}")
        print(f'use it with: opensan segment IMAGE --words "..." --model {saved.folder}')
