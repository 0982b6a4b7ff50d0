"""`opensan tune words --without-labels`: try other texts and templates on a folder, and print figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opensan.cli.terminal import UsageError, note, output_console, print_json, progress_of_steps
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.tune.suggest import Change

SHOWN = 3
"""Changes of a word that are shown; JSON has all."""


def suggest(
    folder: Path,
    vocabulary: Vocabulary | None,
    *,
    model: str,
    device: str,
    images: int,
    descriptions: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Try texts and templates on images without labels, print what changed, and write the suggestion if asked to."""
    if vocabulary is None:
        raise UsageError("--without-labels needs the words: give them by --words, --words-file or --words-set")
    import numpy as np

    from opensan.files import json_text, write_text
    from opensan.images import list_images
    from opensan.segmenters.load import load
    from opensan.segmenters.proposals import with_proposals
    from opensan.tune.suggest import read_descriptions, suggest_words

    own = read_descriptions(descriptions) if descriptions is not None else {}
    found = list_images([folder])
    chosen = [found[int(place)] for place in np.linspace(0, len(found) - 1, min(images, len(found))).round()]
    note(f"loading {model}")
    segmenter = with_proposals(load(model, device=device), "trying texts")
    with progress_of_steps() as progress:
        result = suggest_words(segmenter, chosen, vocabulary, descriptions=own, progress=progress)
    changed = result.suggested != result.words
    if out is not None and changed:
        write_text(out, json_text(result.suggested.to_dict(vectors=True), indent=1) + "\n")
    if as_json:
        plain = {"images": result.images, "agreement": result.agreement, "margin": result.margin}
        changes = [change.to_dict() for change in result.changes]
        print_json({**plain, "changes": changes, "suggested": result.suggested.to_dict() if changed else None})
        return
    console = output_console()
    console.print(
        f"{result.images} images; with the words as they are, {100 * result.agreement:.1f} % of the pixels keep their "
        f"word when the image is mirrored or smaller, and the margin is {100 * result.margin:.1f} %",
        soft_wrap=True,
    )
    console.print(_table(result.changes))
    if not changed:
        console.print(
            "nothing is suggested: no change raises both figures surely, with every word keeping its pixels",
            soft_wrap=True,
        )
        return
    console.print("* is suggested: both figures rise by more than the images differ. They know no labels: look first.")
    if out is not None:
        console.print(f"wrote {out}, the words with all suggestions", soft_wrap=True)
    else:
        console.print("nothing was changed: --out FILE.json writes the words with all suggestions", soft_wrap=True)


def _table(changes: "Sequence[Change]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for title in ("word", "texts in its place", "agreement", "margin", "pixels moved", "words that lose"):
        table.add_column(title, justify="left" if title.startswith(("word", "texts")) else "right")
    shown: dict[str, int] = {}
    for change in changes:
        shown[change.word] = shown.get(change.word, 0) + 1
        if shown[change.word] > SHOWN and not change.suggested:
            continue
        texts = f"templates {change.origin}" if not change.word else "|".join(change.texts)
        table.add_row(
            Text(change.word or "all"),
            Text(("* " if change.suggested else "") + texts),
            f"{100 * change.agreement:+.1f}",
            f"{100 * change.margin:+.1f}",
            f"{100 * change.moved:.1f} %",
            Text(", ".join(change.loses)),
        )
    return table
