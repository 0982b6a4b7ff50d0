"""`opensan words`: list the label sets of the package."""

from typing import Annotated

import typer

from opensan.cli.options import AsJson, starting_with
from opensan.cli.terminal import print_json
from opensan.vocabulary import Vocabulary, ready_sets


def words(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A set: print its words, one a line.",
            show_default=False,
            autocompletion=lambda incomplete: starting_with(incomplete, ready_sets()),
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the ready label sets, or the words of one.

    The words of a set, printed to a file, make a good start for a --words-file of your own.
    """
    if as_json:
        found = {known: Vocabulary.ready(known).names for known in ([name] if name is not None else ready_sets())}
        print_json(found)
        return
    if name is not None:
        print("\n".join(Vocabulary.ready(name).names))
        return
    for known in ready_sets():
        print(f"{known:<20} {len(Vocabulary.ready(known).names):>4} words")
