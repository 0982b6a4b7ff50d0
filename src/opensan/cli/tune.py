"""`opensan tune`: fit words to images of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.choices import Tuned
from opensan.cli.asked_words import Background, Templates, Words, WordsFile, WordsSet, asked_vocabulary
from opensan.cli.options import RESULTS, AsJson, Device, Model
from opensan.cli.suggestions import suggest
from opensan.cli.terminal import (
    Command,
    Commands,
    UsageError,
    complain,
    note,
    output_console,
    print_json,
    progress_of_steps,
)
from opensan.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.tune.run import Tuning

tune = typer.Typer(name="tune", cls=Commands, rich_markup_mode=None)


@tune.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """Fit words to images of your own."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@tune.command("words", cls=Command)
def tune_words(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Labelled images: a folder with images/, labels/ and classes.txt, or a .json file of points.",
            show_default=False,
        ),
    ] = None,
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    model: Model = "san-vit-b16",
    split: Annotated[
        str | None, typer.Option(help="The list of images. Default: train, or all.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD", help="A class whose labels are left out. May be given several times.", show_default=False
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Most images, spread evenly over the list.")] = 50,
    what: Annotated[
        Tuned,
        typer.Option(help="A vector for each labelled word, one offset for all words (context), or both."),
    ] = "vectors",
    without_labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="In place of DATA: images without labels. Other texts and templates are tried, and suggested.",
            show_default=False,
        ),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='With --without-labels: texts of your own to try, {"car": ["a parked car"]}.',
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Fits with other pixels; their mean is written.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.json",
            help="The words. Default: tuned.json; with --without-labels, nothing is written.",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit the vectors of words to a few labelled images; the model stays as it is.

    Writes a word file with the vectors in it, for --words-file everywhere, with this model alone. Figures are those of
    images that were left out; if none of them gets better, nothing is written, and the exit code is 1.
    With --without-labels, other texts for the words and other templates are tried on a folder, and those that make the
    answers surer are suggested, with figures.
    """
    if (data is None) == (without_labels is None):
        raise UsageError("give either labelled images, or --without-labels and a folder of images")
    if without_labels is None and descriptions is not None:
        raise UsageError("--descriptions belongs to --without-labels")
    asked = words or words_file or words_set or background or templates
    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates) if asked else None
    if without_labels is not None:
        if out is not None:
            _check_out(out, tuned=False)
        suggest(
            without_labels,
            vocabulary,
            model=model,
            device=device,
            images=images,
            descriptions=descriptions,
            out=out,
            as_json=as_json,
        )
        return
    assert data is not None  # see above
    out = out or Path("tuned.json")
    _check_out(out)
    from opensan.segmenters.load import load_with_torch
    from opensan.tune import run

    note(f"loading {model}")
    segmenter = load_with_torch(model, device=device)
    with progress_of_steps() as progress:
        tuning = run.tune_words(
            data,
            vocabulary,
            segmenter,
            what=what,
            split=split,
            ignored=ignore or (),
            limit=images,
            seeds=seeds,
            progress=progress,
        )
    if tuning.helped:
        tuning.save(out)
    if as_json:
        print_json(_plain(tuning, out))
    else:
        _print(tuning, out)
    if not tuning.helped:
        complain(
            "error: nothing written: images that were left out got no better; label more images, or other words "
            "(a word that is none of the image's takes its pixels)"
        )
        raise typer.Exit(1)


def _check_out(out: Path, *, tuned: bool = True) -> None:
    """Raise UserError if the file can't be written, or is there and holds no tuned words, but somebody's own list."""
    from opensan.outputs import check_writable
    from opensan.word_lists import TunedWords

    if out.suffix.lower() != ".json":
        raise UserError(f"--out {out}: words are written as a .json file")
    check_writable(out.absolute().parent)
    if out.exists() and not tuned:
        raise UserError(f"--out {out}: is there already: choose another name")
    if out.exists():
        try:
            TunedWords.from_file(out)
        except UserError:
            raise UserError(f"--out {out}: is there already, and holds no tuned words: choose another name") from None


def _plain(tuning: "Tuning", out: Path) -> dict[str, object]:
    return {
        "images": tuning.images,
        "pixels": tuning.pixels,
        "steps": tuning.steps,
        "left_out": tuning.held_out,
        "before": tuning.before.to_dict(),
        "after": [one.to_dict() for one in tuning.after],
        "unlabelled": list(tuning.unlabelled),
        "file": str(out) if tuning.helped else None,
    }


def _print(tuning: "Tuning", out: Path) -> None:
    console = output_console()
    whose = "on images left out" if tuning.held_out else "on the labelled image itself"
    seeds = len(tuning.after)
    console.print(
        f"{tuning.images} images, {tuning.pixels:,} labelled pixels; IoU {whose}, mean of {seeds} seeds", soft_wrap=True
    )
    console.print(_table(tuning))
    if seeds > 1:
        low, high = (f"{100 * figure:.1f}" for figure in tuning.spread)
        console.print(f"by seed, the mean IoU after is {low} to {high} %", soft_wrap=True)
    if not tuning.held_out:
        console.print("one image can't be left out: label a second one for figures that mean more", soft_wrap=True)
    if tuning.unlabelled:
        console.print(f"without labels, so with their own text: {', '.join(tuning.unlabelled)}", soft_wrap=True)
    if tuning.helped:
        console.print(f"wrote {out}: give it as --words-file, with this model", soft_wrap=True)


def _table(tuning: "Tuning") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from opensan.tune.run import WordFigures

    table = Table(box=box.SIMPLE)
    table.add_column("word")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    after = WordFigures.mean(tuning.after)
    for name, iou in tuning.before.words.items():
        table.add_row(Text(name), f"{100 * iou:.1f} %", f"{100 * after.words[name]:.1f} %")
    for title, first, second in (
        ("mean IoU", tuning.before.miou, after.miou),
        ("pixels right", tuning.before.pixel_accuracy, after.pixel_accuracy),
    ):
        table.add_row(title, f"{100 * first:.1f} %", f"{100 * second:.1f} %")
    return table
