"""`opensan lab`: experiments that anyone can repeat on a laptop."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from opensan.choices import AblationData
from opensan.cli.terminal import Command, Commands, note, output_console

lab = typer.Typer(name="lab", cls=Commands, rich_markup_mode=None)


@lab.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """Repeat the paper's experiments on drawn scenes or small sets of photographs."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@lab.command(cls=Command)
def ablate(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variant; again for more. Default: all (--list).", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1_000, help="Runs of each variant.")] = 3,
    data: Annotated[AblationData, typer.Option(help="What to train and test on.")] = "scenes",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder for runs and results.")] = Path(
        "ablations"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 1_200,
    batch: Annotated[int, typer.Option(min=1, help="Crops a step.")] = 8,
    crop: Annotated[int, typer.Option(min=32, max=1_024, help="Side of a crop, a multiple of 32.")] = 128,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 2_000,
    tests: Annotated[int, typer.Option(min=1, help="Images of each test set.")] = 200,
    clip: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A CLIP that the lab trained. Default: that of tiny.", show_default=False),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --data photographs: camvid and labelmefacade.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the variants.")] = False,
) -> None:
    """Train and test variants of SAN with equal budgets.

    Writes runs.csv (a line a run), ablations.md (means, spread over seeds, differences from the base with intervals)
    and ablations.png after every run. The same command continues after an interruption.
    """
    from opensan.lab.ablation.variants import chosen

    variants = chosen(only or [])
    if list_:
        for variant in variants:
            print(f"{variant.name:<26} {variant.claim}")
        return
    from opensan.lab.ablation.run import Budget, Setup
    from opensan.lab.ablation.run import ablate as run_all

    _check(crop, out)
    budget = Budget(data, steps=steps, batch=batch, crop=crop, train=scenes, tests=tests)
    _show(lambda: run_all(variants, Setup(budget, clip, root), seeds, out, say=note), out / "ablations.md")


@lab.command(cls=Command)
def depth(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A training; again for more. Default: all.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1_000, help="Runs of each training.")] = 3,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder for runs and results.")] = Path(
        "depth"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 1_200,
    batch: Annotated[int, typer.Option(min=1, help="Scenes a step.")] = 4,
    crop: Annotated[int, typer.Option("--size", min=32, max=1_024, help="Side of a scene, a multiple of 32.")] = 96,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 400,
    tests: Annotated[int, typer.Option(min=1, help="Scenes to test on.")] = 100,
    clip: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A CLIP that the lab trained. Default: that of tiny.", show_default=False),
    ] = None,
) -> None:
    """Train SANs whose words are distances, and measure the depth that they read on drawn scenes.

    Writes runs.csv (a line a run and reading) and depth.md (means with intervals, beside plain baselines) after every
    run, and scenes.png (image, true depth, depth read) after the first. The same command continues after an
    interruption.
    """
    from opensan.lab.ablation.run import Budget, Setup
    from opensan.lab.depth.run import chosen, measure_depth

    variants = chosen(only or [])
    _check(crop, out, "--size")
    budget = Budget(steps=steps, batch=batch, crop=crop, train=scenes, tests=tests)
    _show(lambda: measure_depth(variants, Setup(budget, clip, None), seeds, out, say=note), out / "depth.md")


def _check(crop: int, out: Path, option: str = "--crop") -> None:
    """Raise UserError, one line, unless the side suits the networks and `out` can be written to."""
    from opensan.errors import UserError
    from opensan.outputs import check_writable

    if crop % 32:
        raise UserError(f"{option} {crop}: not a multiple of 32; the nearest is {max(32, round(crop / 32) * 32)}")
    check_writable(out)


def _show(work: Callable[[], list[Path]], table: Path) -> None:
    """Do the work, and print its table and the names of its files."""
    try:
        files = work()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    output_console().print(table.read_text(encoding="utf-8"), soft_wrap=True, markup=False)
    for path in files:
        print(f"wrote {path}")
