"""`opensan similarity`: compare two label sets in a model's text space."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.cli.options import AsJson, Device, Model, starting_with
from opensan.cli.terminal import note, output_console, print_json
from opensan.errors import UserError
from opensan.vocabulary import ready_sets


def _sets(incomplete: str) -> list[str]:
    return starting_with(incomplete, ready_sets())


SetOrFile = Annotated[
    str, typer.Argument(help="A ready set, or a file of words.", show_default=False, autocompletion=_sets)
]


def similarity(
    first: SetOrFile,
    second: SetOrFile,
    model: Model = "san-vit-b16",
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="The heat map of all pairs of words.")
    ] = Path("similarity.png"),
    farthest: Annotated[int, typer.Option(min=1, help="Words of each set that are named.")] = 5,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare two label sets in the space of a model's text embeddings.

    Prints the Hausdorff distance (the largest distance of a word from the other set; one minus the cosine), the mean
    cosine of words with the nearest of the other set, and the words that are farthest; writes a heat map.
    """
    from opensan.evaluation.similarity import compare, heat_map, named_vocabulary

    vocabularies = [named_vocabulary(source) for source in (first, second)]
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the heat map is a .png")
    from opensan.files import atomic_path
    from opensan.outputs import check_writable
    from opensan.segmenters.load import load

    check_writable(out.absolute().parent)
    note(f"loading {model}")
    segmenter = load(model, device=device)
    text = getattr(segmenter, "text", None)
    if text is None:
        raise UserError(f"{segmenter.identity.name} has no text embeddings to compare words by")
    result = compare(text, *vocabularies)
    with atomic_path(out) as path:
        heat_map(result).save(path, "PNG")
    if as_json:
        print_json({"model": str(segmenter.identity), "map": str(out), **result.to_dict(farthest)})
        return
    console = output_console()
    console.print(f"Hausdorff distance {result.hausdorff:.3f}", soft_wrap=True)
    sides = zip(
        (first, second), (second, first), result.directed, result.mean_best, result.farthest(farthest), strict=True
    )
    for own, other, directed, mean, words in sides:
        console.print(f"{own} in {other}: mean best cosine {mean:.3f}, largest distance {directed:.3f}", soft_wrap=True)
        for word, nearest, cosine in words:
            console.print(f"  {word} (nearest: {nearest}, {cosine:.3f})", soft_wrap=True, markup=False)
    console.print(f"wrote {out}", soft_wrap=True)
