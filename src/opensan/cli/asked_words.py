"""How commands are asked for words."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.cli.terminal import UsageError
from opensan.vocabulary import Vocabulary

Words = Annotated[
    str | None,
    typer.Option(help='What to look for: "road, car|automobile|taxi, sky" (| joins synonyms).', show_default=False),
]
WordsFile = Annotated[
    Path | None, typer.Option(help="The words from a file: a word a line, or JSON.", show_default=False)
]
WordsSet = Annotated[
    str | None, typer.Option(help="A ready label set; `opensan words` lists them.", show_default=False)
]
Background = Annotated[str, typer.Option(help="Words whose pixels are reported as unlabelled.", show_default=False)]
Templates = Annotated[
    str | None,
    typer.Option(help="Prompts: vild (the default), single, or a file with one a line.", show_default=False),
]


def asked_vocabulary(
    words: str | None, words_file: Path | None, words_set: str | None, background: str, templates: str | None
) -> Vocabulary:
    """The words that a command was given. Raises UsageError unless they were given in exactly one way."""
    given = {"--words": words, "--words-file": words_file, "--words-set": words_set}
    if sum(value is not None for value in given.values()) != 1:
        raise UsageError(f"give the words by exactly one of {', '.join(given)}")
    if words_file is not None:
        return Vocabulary.from_file(words_file, background=background, templates=templates)
    if words_set is not None:
        return Vocabulary.ready(words_set, background=background, templates=templates)
    return Vocabulary.parse(words, background=background, templates=templates)
