"""`opensan calibrate`: fit how sure a model is said to be on labelled images."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.cli.asked_words import embed_words
from opensan.cli.options import AsJson, Device, ImageDtype, Model, SpeedChoice
from opensan.cli.terminal import complain, note, output_console, print_json, progress_of

SHOWN = 10
"""Most broken images that are named."""


def calibrate(
    data: Annotated[Path, typer.Option(metavar="DIR", help="A prepared data set that the model was not trained on.")],
    model: Model = "san-vit-b16",
    split: Annotated[
        str | None,
        typer.Option(help="The list of images. Default: the data set's own for this, or val.", show_default=False),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Use only so many, spread evenly over the list. Default: all.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write (JSON).")] = Path(
        "calibration.json"
    ),
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    as_json: AsJson = False,
) -> None:
    """Fit a calibration, with which confidences are probabilities, on labelled images.

    Use it with --calibration FILE, or copy it as calibration.json into the model's folder. It changes no label.
    The same command continues after an interruption.
    """
    from opensan.errors import writing
    from opensan.evaluation.calibrate import fit_calibration
    from opensan.evaluation.sets import open_set
    from opensan.files import hold
    from opensan.outputs import check_writable
    from opensan.segmenters.load import load

    prepared = open_set(data, split)
    check_writable(out.parent)
    note(f"loading {model}")
    segmenter = load(model, device=device, speed=speed, dtype=dtype)
    segmenter.calibrate(None)
    embed_words(segmenter, prepared.dataset.vocabulary)
    name = f"{prepared.name}, {prepared.dataset.split}"
    console = output_console()
    busy = f"{out}: another calibration is writing there; wait for it, or choose another --out"
    kept = out.with_name(f"{out.name}.progress.sqlite")
    with hold(out.with_name(f".{out.name}.lock"), busy), progress_of(console, "calibrating") as progress:
        try:
            found, broken = fit_calibration(
                segmenter, prepared.dataset, name, images=images, kept=kept, progress=progress
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where it was") from None
        with writing(out):
            found.save(out)
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(f"{name}: {found.images:,} images, {found.pixels:,} pixels, {len(found.words):,} words")
        console.print(f"  temperature{'':<21}{found.temperature:>7.3f}")
        if found.doubtful_temperature is not None:
            below = f"where no score reaches {found.doubtful_below:.2f}"
            console.print(f"  {below:<32}{found.doubtful_temperature:>7.3f}")
        console.print(f"  {'calibration error before':<32}{100 * found.ece_before:>7.2f} %")
        console.print(f"  {'after, on these same images':<32}{100 * found.ece_after:>7.2f} %")
        console.print(f"wrote {out}", soft_wrap=True)
    for line in broken[:SHOWN]:
        complain(f"error: {line}")
    if len(broken) > SHOWN:
        complain(f"error: {len(broken) - SHOWN:,} more images could not be read")
    if broken:
        raise typer.Exit(1)
