"""`opensan data`: data sets as their authors distribute them, into the one layout that training and evaluation read."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.cli.terminal import UsageError, complain, output_console, progress_bar

if TYPE_CHECKING:
    from opensan.data.canonical import Manifest
    from opensan.data.prepare import Reader

SHOWN = 10
"""A thousand left-out photographs are not named one by one; the manifest has them all."""

data = typer.Typer(name="data", rich_markup_mode=None)


@data.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """Prepare data sets for training and evaluation, and check them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Say all about one data set.", show_default=False)] = None,
) -> None:
    """List the data sets that can be prepared; of one: what it needs, where it is obtained, and its options."""
    from opensan.data.prepare import READERS

    if name is not None:
        print("\n".join(_description(_reader(name))))
        return
    width = max(map(len, READERS), default=0)
    for reader in READERS.values():
        print(f"{reader.name:<{width}}  {reader.description}")


def _reader(name: str) -> "Reader":
    from opensan.data.prepare import READERS

    if name not in READERS:
        raise UsageError(f"no data set is called {name!r}: choose from {', '.join(READERS)}")
    return READERS[name]


def _description(reader: "Reader") -> list[str]:
    lines = [f"{reader.name}: {reader.description}"]
    if reader.classes:
        lines.append(f"classes: {reader.classes}")
    if reader.expected:
        lines.append("photographs: " + ", ".join(f"{split} {count:,}" for split, count in reader.expected.items()))
    for title in ("needs", "obtained", "terms"):
        if text := getattr(reader, title):
            lines.append(f"{title}: {text}")
    lines += [f"option {key}=...: {help_}" for key, help_ in reader.options.items()]
    return lines


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(help="What the data is: see `opensan data list`.", show_default=False)],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its options: see `opensan data list NAME`.", show_default=False),
    ] = None,
    source: Annotated[Path, typer.Option(metavar="DIR", help="The data as downloaded.", show_default=False)] = ...,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, or one to go on with.")] = ...,
    split: Annotated[
        list[str] | None, typer.Option(help="Only this split; may be given again.", show_default=False)
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; one for each core if not given.", show_default=False)
    ] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
) -> None:
    """Write a data set in the one layout that training and evaluation read.

    Photographs are linked, labels written as index PNGs, with classes, split lists and a manifest. A stopped run goes
    on with the same command. A photograph that can't be used is left out and named, and the exit code is 1.
    """
    reader = _reader(name)
    values = _option_values(reader, options or [])
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; it must hold {reader.needs or 'the data'}")

    from opensan.data.prepare.engine import prepare as write

    opened = reader.open(source, **values)
    wanted = [one for one in opened.photographs if not split or set(one.splits) & set(split)]
    with progress_bar(output_console(), f"preparing {name}", len(wanted)) as advance:
        manifest = write(opened, name, out, options=values, splits=split, workers=workers, progress=advance)
    _report(reader, manifest, out)
    if manifest.left_out:
        raise typer.Exit(1)


def _option_values(reader: "Reader", arguments: list[str]) -> dict[str, str]:
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in reader.options:
            known = ", ".join(f"{known}=..." for known in reader.options) or "none"
            raise UsageError(f"{reader.name} has no option {argument!r}: known are {known}")
        values[key] = value
    return values


def _report(reader: "Reader", manifest: "Manifest", out: Path) -> None:
    for split, count in manifest.splits.items():
        expected = reader.expected.get(split, count)
        print(f"{split:<12} {count:>9,} photographs" + (f" of {expected:,}" if count != expected else ""))
    print(f"{out}: {manifest.photographs:,} photographs, {len(manifest.request.classes)} classes")
    for name, reason in list(manifest.left_out.items())[:SHOWN]:
        complain(f"left out: {name}: {reason}")
    if (count := len(manifest.left_out)) > SHOWN:
        complain(f"left out: {count:,} photographs in all; {out / 'manifest.json'} names them")
