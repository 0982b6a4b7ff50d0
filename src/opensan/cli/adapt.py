"""`opensan adapt`: adapt a model to images without labels."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.cli.asked_words import Background, Templates, Words, WordsFile, WordsSet, asked_vocabulary
from opensan.cli.options import AsJson, Device, Model, Out
from opensan.cli.terminal import INTERRUPTED, complain, note, output_console, print_json
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.tune.adapt import Adaptation, Checked

TRAINING = "Training"
"""Group of options in the help."""


def adapt(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images without labels, in it and below it.")],
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    model: Model = "san-vit-b16",
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A prepared set with labels: measured before and after; if it gets worse, the model is kept apart.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A prepared set of old images to mix in, so that other words do not suffer. Default: drawn scenes "
            "for tiny; for others, a loss that keeps the answers for other words.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Most steps; it ends earlier.", rich_help_panel=TRAINING)
    ] = 120,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Crops a step.", rich_help_panel=TRAINING)] = 4,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, max=1, help="AdamW's learning rate.", rich_help_panel=TRAINING)
    ] = 2e-5,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Learn from pixels of such confidence alone. Default: 0.8 if the model is calibrated, else what half "
            "of each word's pixels reach.",
            show_default=False,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the images' order and crops.", rich_help_panel=TRAINING)
    ] = 0,
    device: Device = "auto",
    out: Out = Path("adapted"),
    as_json: AsJson = False,
) -> None:
    """Adapt a model to a folder of images that nobody labelled, by training on its own surest answers.

    Writes OUT/model, for --model everywhere. The same command continues after an interruption. If its answers get no
    steadier, no model is written; if the check set gets worse, the model is in OUT/rejected. The exit code is 1 then.
    """
    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates)

    from torch import OutOfMemoryError

    from opensan.cli.training_bar import TrainingBar
    from opensan.train.loop import Diverged
    from opensan.tune.adapt import AdaptSettings
    from opensan.tune.adapt import adapt as run

    settings = AdaptSettings(steps, batch, learning_rate, confidence, seed=seed)
    try:
        result = run(
            folder,
            vocabulary,
            model,
            out=out,
            check=check,
            replay=replay,
            settings=settings,
            device=device,
            say=note,
            progress=TrainingBar() if sys.stderr.isatty() else None,
        )
    except OutOfMemoryError:
        raise UserError("out of memory: try a smaller --batch") from None
    except Diverged as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)
    if result.folder is None:
        complain(
            f"error: no model written: the answers got no steadier in {result.steps} steps; a lower --learning-rate, "
            "a higher --confidence, or words that name all that is there may help, and a few labels help more"
        )
    elif result.rejected:
        complain(f"error: the check set got worse: the adapted model is kept apart in {result.folder}, not installed")
    if result.folder is None or result.rejected:
        raise typer.Exit(1)


def _print(result: "Adaptation") -> None:
    console = output_console()
    console.print(
        f"{result.steps} steps, on pixels of confidence {result.confidence:g} or more; of all pixels, "
        f"{100 * result.before:.1f} % kept their word when an image was mirrored or smaller, and "
        f"{100 * result.after:.1f} % do after step {result.step}",
        soft_wrap=True,
    )
    if result.check_before is not None and result.check_after is not None:
        console.print(f"{'mean IoU on the check set':<28}{'before':>9}{'after':>9}")
        for title, name in (("all words", "miou"), ("words asked for", "asked"), ("other words", "others")):
            console.print(f"  {title:<26}{_share(result.check_before, name)}{_share(result.check_after, name)}")
    if result.folder is not None and not result.rejected:
        console.print(f"wrote {result.folder}: give it as --model", soft_wrap=True)


def _share(check: "Checked", name: str) -> str:
    value = 100 * getattr(check, name)
    return f"{'-':>9}" if value != value else f"{value:>7.1f} %"
