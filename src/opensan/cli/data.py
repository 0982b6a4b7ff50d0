"""`opensan data`: convert data sets to the layout that training and evaluation read."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.cli.options import AsJson, starting_with
from opensan.cli.terminal import (
    Command,
    Commands,
    UsageError,
    complain,
    note,
    output_console,
    print_json,
    progress_bar,
    progress_of_steps,
)
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.data.canonical import ClassCount, DatasetManifest
    from opensan.data.prepare import Reader

SHOWN_CLASSES = 40
SHOWN = 10
"""Most left-out images that are named; the manifest has all."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Workers = Annotated[int, typer.Option(min=1, help="Processes; one for each core if not given.", show_default=False)]

data = typer.Typer(name="data", cls=Commands, rich_markup_mode=None)


@data.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """Prepare data sets for training and evaluation, and check them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _names_of_forms(incomplete: str) -> list[str]:
    from opensan.data.prepare import READERS

    return starting_with(incomplete, READERS)


@data.command("list", cls=Command)
def list_(
    name: Annotated[
        str | None, typer.Argument(help="Describe one data set.", show_default=False, autocompletion=_names_of_forms)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets that can be prepared; for one: its files, source and options."""
    from opensan.data.prepare import READERS

    chosen = [_reader(name)] if name is not None else list(READERS.values())
    if as_json:
        told = ("name", "description", "classes", "needs", "obtained", "terms", "expected", "options")
        print_json([{key: getattr(reader, key) for key in told} for reader in chosen])
        return
    if name is not None:
        print("\n".join(_description(chosen[0])))
        return
    width = max(map(len, READERS))
    for reader in READERS.values():
        facts = [reader.description]
        if reader.expected:
            counts = ", ".join(f"{split} {count:,}" for split, count in reader.expected.items())
            facts += [counts, reader.terms]
        print(f"{reader.name:<{width}}  {'; '.join(facts)}")
    note("opensan data list NAME says what one needs, and where it is obtained")


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
        lines.append("images: " + ", ".join(f"{split} {count:,}" for split, count in reader.expected.items()))
    for title in ("needs", "obtained", "terms"):
        if text := getattr(reader, title):
            lines.append(f"{title}: {text}")
    lines += [f"option {key}=...: {help_}" for key, help_ in reader.options.items()]
    return lines


REQUIRED: Any = ...
"""How typer marks an option without default."""


@data.command(cls=Command)
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="The kind of data: see `opensan data list`.", show_default=False, autocompletion=_names_of_forms
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its options: see `opensan data list NAME`.", show_default=False),
    ] = None,
    source: Annotated[Path, typer.Option(metavar="DIR", help="The data as downloaded.", show_default=False)] = REQUIRED,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="A new folder, or one to continue.")
    ] = REQUIRED,
    split: Annotated[
        list[str] | None, typer.Option(help="Only this split; may be given again.", show_default=False)
    ] = None,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Convert a data set to the layout that training and evaluation read.

    Images are linked, labels written as index PNGs, with classes, split lists and a manifest. A stopped run continues
    with the same command. What can't be used is left out and named, and the exit code is 1.
    """
    reader = _reader(name)
    values = _option_values(reader, options or [])
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; it must hold {reader.needs or 'the data'}")

    from opensan.data.check import shortfalls
    from opensan.data.prepare.engine import prepare as write

    note(f"reading {source}")
    try:
        opened = reader.open(source, **values)
    except UserError:  # a HubError is an OSError too
        raise
    except OSError as error:
        raise UserError(f"{error.filename or source}: can't be read ({error.strerror or error})") from None
    wanted = [image for image in opened.images if not split or set(image.splits) & set(split)]
    try:
        with progress_bar(output_console(), f"preparing {name}", len(wanted)) as advance:
            manifest = write(
                opened, name, out, options=values, splits=split, workers=workers, progress=advance, note=complain
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    if as_json:
        print_json(
            {"folder": str(out), "images": manifest.photographs, "splits": manifest.splits, "pixels": manifest.pixels}
            | {"classes": _class_rows(manifest.request.classes, manifest.counts), "left_out": manifest.left_out}
            | {"notes": [*manifest.notes, *shortfalls(reader, manifest.splits, manifest.request.splits)]}
        )
        whole = not manifest.left_out
    else:
        whole = _report(reader, manifest, out)
    if not whole:
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


def _report(reader: "Reader", manifest: "DatasetManifest", out: Path) -> bool:
    """Print the counts, and the left-out images with reasons; return true if there are none.

    Fewer images than the set has elsewhere are told, and no mistake here: who prepares a sample knows it.
    """
    from opensan.data.check import shortfalls

    _print_counts(manifest.splits, reader, manifest.request.splits)
    _print_classes(manifest.request.classes, manifest.counts, manifest.pixels)
    counted = [(manifest.photographs, "image", "images"), (len(manifest.request.classes), "class", "classes")]
    print(f"{out}: " + ", ".join(f"{count:,} {singular if count == 1 else many}" for count, singular, many in counted))
    for line in manifest.notes:
        complain(f"note: {line}")
    for line in shortfalls(reader, manifest.splits, manifest.request.splits):
        complain(f"note: {line}")
    _complain_of([f"left out: {name}: {reason}" for name, reason in manifest.left_out.items()], out / "manifest.json")
    if manifest.left_out:
        complain(f"{len(manifest.left_out):,} left out")
    return not manifest.left_out


def _class_rows(lines: Sequence[str], counts: Sequence["ClassCount"]) -> list[dict[str, Any]]:
    """Return each class with its images and pixels, as plain data; None where they were not counted."""
    known: list[Any] = [(count.images, count.pixels) for count in counts] or [(None, None)] * len(lines)
    return [
        {"name": line.partition("|")[0], "images": images, "pixels": pixels}
        for line, (images, pixels) in zip(lines, known, strict=True)
    ]


def _print_classes(lines: Sequence[str], counts: Sequence["ClassCount"], pixels: int) -> None:
    """Print a line a class: its images, pixels and their share; of many classes, those with most pixels."""
    if not counts or not pixels:
        return
    names = [line.partition("|")[0] for line in lines]
    shown = list(range(len(names)))
    if len(shown) > SHOWN_CLASSES:
        shown = [label for label in shown if counts[label].pixels]
        shown = sorted(shown, key=lambda label: -counts[label].pixels)[:SHOWN_CLASSES]
    width = max(map(len, ["unlabelled", *(names[label] for label in shown)]))
    row = f"{{:<{width}}}  {{:>9}}  {{:>16}}  {{:>7}}".format

    def share(part: int) -> str:
        return f"{part / pixels:.2%}" if pixels else "-"

    print(row("class", "images", "pixels", "share"))
    for label in shown:
        count = counts[label]
        print(row(names[label], f"{count.images:,}", f"{count.pixels:,}", share(count.pixels)))
    if rest := sum(count.pixels > 0 for count in counts) - sum(counts[label].pixels > 0 for label in shown):
        print(f"{rest:,} more")
    unlabelled = pixels - sum(count.pixels for count in counts)
    print(row("unlabelled", "", f"{unlabelled:,}", share(unlabelled)))
    if empty := [name for name, count in zip(names, counts, strict=True) if not count.pixels]:
        more = f" and {len(empty) - SHOWN:,} more" if len(empty) > SHOWN else ""
        complain(f"note: {len(empty):,} of {len(names):,} classes have no pixel: {', '.join(empty[:SHOWN])}{more}")


def _print_counts(
    splits: dict[str, int], reader: "Reader | None" = None, asked_for: tuple[str, ...] | None = None
) -> None:
    """Print a line a split, also for missing splits that were not excluded by request."""
    expected = reader.expected if reader else {}
    if asked_for is not None:
        expected = {split: count for split, count in expected.items() if split in asked_for}
    for split in [*splits, *(split for split in expected if split not in splits)]:
        count, of = splits.get(split, 0), expected.get(split)
        print(
            f"{split:<12} {count:>9,} image{'s' if count != 1 else ''}"
            + (f" of {of:,}" if of not in (None, count) else "")
        )


def _complain_of(problems: list[str], all_in: Path | None = None) -> None:
    for problem in problems[:SHOWN]:
        complain(problem)
    if len(problems) > SHOWN:
        complain(f"and {len(problems) - SHOWN:,} more" + (f"; {all_in} names them" if all_in else ""))


@data.command(cls=Command)
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared folder.", show_default=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Check only that files exist and have their size; read none.")
    ] = False,
    workers: Workers = CORES,
    as_json: AsJson = False,
) -> None:
    """Check that a prepared folder is complete.

    Lists, images, labels, their sizes, values and checksums. Names missing parts and their source; the
    exit code is 1 if anything is.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    from opensan.data.check import FolderCheck
    from opensan.data.prepare import READERS

    check = FolderCheck(folder)
    with progress_bar(output_console(), f"checking {folder.name}", len(check)) as advance:
        check.look(quick=quick, workers=workers, progress=advance)
    if as_json:
        print_json(
            {"folder": str(folder), "splits": check.splits, "pixels": check.pixels, "problems": list(check.problems)}
            | {"classes": _class_rows(check.classes, check.counts)}
        )
        if check.problems:
            raise typer.Exit(1)
        return
    reader = None
    if check.manifest is not None:
        reader = READERS.get(check.manifest.request.source)
        _print_counts(check.splits, reader, check.manifest.request.splits)
    else:
        _print_counts(check.splits)
    _print_classes(check.classes, check.counts, check.pixels)
    if check.manifest is None:
        complain("note: there is no manifest.json, so there are no counts and checksums to compare with")
    if not check.problems:
        print(f"{folder}: whole")
        return
    _complain_of(check.problems)
    if reader and reader.obtained:
        complain(f"{reader.name} is obtained from {reader.obtained}")
    problems = len(check.problems)
    print(f"{folder}: {problems:,} problem{'s' if problems > 1 else ''}")
    raise typer.Exit(1)


@data.command(cls=Command)
def shards(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A prepared folder; or one of tar files and classes.txt.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="A folder for a prepared set's shards.", show_default=False),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="A list of images, or what tar files are called by; may be given again.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=1, metavar="MIB", help="Size of a shard, at most.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Write a prepared set as shards, from which a bucket feeds a training on many machines.

    Shards are tar files in WebDataset's form, with lists of where each image lies. A stopped run continues with the
    same command. Without --out, the tar files of another program in DIR are listed (SPLIT-*.tar; default split: train).
    """
    from opensan.data.shards import adopt_shards, write_shards

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    told: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    lists = sorted(path.stem for path in folder.glob("*.txt") if path.name != "classes.txt")
    for name in split or (["train"] if out is None else lists):
        if out is None:
            tars = list(folder.glob(f"{name}*.tar"))
            if not tars:
                raise UserError(f"{folder}: has no {name}*.tar to list; --out writes the shards of a prepared folder")
            made, left_out = adopt_shards(folder, name, tars)
        else:
            with progress_of_steps() as show:
                made, left_out = write_shards(
                    folder, name, out, most_bytes=size << 20, progress=partial(show, f"writing {name}")
                )
        problems += left_out
        told[name] = {"shards": len(made), "images": sum(shard.samples for shard in made)}
        told[name]["bytes"] = sum(shard.size for shard in made)
        if not as_json:
            counts = told[name]
            print(f"{name:<12} {counts['images']:>9,} images in {counts['shards']:,} shards, {counts['bytes']:,} bytes")
    if as_json:
        print_json({"folder": str(out or folder), "splits": told, "left_out": problems})
    else:
        _complain_of(problems)
    if problems:
        raise typer.Exit(1)
