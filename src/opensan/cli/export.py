"""`opensan export`: write a model as files for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.choices import ExportDtype, ExportFormat
from opensan.cli.asked_words import Background, Templates, Words, WordsFile, WordsSet, asked_vocabulary
from opensan.cli.options import AsJson
from opensan.cli.terminal import complain, note, print_json, progress_of_steps
from opensan.errors import UserError


def export(
    model: Annotated[str, typer.Argument(help="As for `opensan segment --model`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; it must not exist.")],
    format: Annotated[ExportFormat, typer.Option(help="torch: torch.export's .pt2 files.")] = "onnx",
    dtype: Annotated[
        ExportDtype,
        typer.Option(
            help="Of the weights. float16: half the size, computed with in float32. bfloat16 (openvino): half the "
            "size, and faster where the processor has bfloat16. int8: a quarter of the size, less exact."
        ),
    ] = "float32",
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="Whether to write the text tower, which reads any words.")
    ] = True,
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    random_weights: Annotated[
        int | None,
        typer.Option(
            metavar="SEED", help="Random weights without a download, to see sizes and speed.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, OpenVINO or torch.export files, for images of any size and any words.

    Words given here are embedded now: with --no-text, the folder knows those and no others.

    The files are compared with the model before they are kept; the largest differences are printed, and the exit code
    is 1 if they are too large. The model's calibration.json is copied, if it has one.
    """
    known = None
    if background or any((words, words_file, words_set, templates)):
        known = asked_vocabulary(words, words_file, words_set, background, templates)
    note(f"loading {model}")
    from opensan.checkpoints import load_model, random_model
    from opensan.export import export as write
    from opensan.segmenters.load import find_calibration

    chosen = None if random_weights is not None else find_calibration(model)
    loaded = load_model(model) if random_weights is None else random_model(model, random_weights)
    with progress_of_steps() as progress:
        folder, check = write(
            loaded,
            out,
            format=format,
            dtype=dtype,
            text=text,
            words=known,
            calibration=chosen and chosen[1],
            progress=progress,
        )
    if as_json:
        print_json(
            {"folder": str(folder), "written": check.passed, "differences": check.differences}
            | {"labels_agree": check.agreement}
        )
        if not check.passed:
            raise typer.Exit(1)
        return
    for tensor, difference in check.differences.items():
        print(f"{tensor:<20} differ by {difference:.1e} of the largest at most")
    print(f"{'labels':<20} agree at {100 * check.agreement:.3f}% of the pixels")
    if not check.passed:
        raise UserError(
            f"the exported model answers differently (allowed: {check.limits.difference:.0e} and "
            f"{100 * check.limits.agreement:.1f}% of the labels); nothing was written"
        )
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"wrote {folder} ({size:.0f} MiB)")
    if not text and known is None:
        complain(f"warning: {folder} has neither a text tower nor words: give it some by --words")
