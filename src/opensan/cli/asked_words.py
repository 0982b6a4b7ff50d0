"""Options of commands for words."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from opensan.cli.options import starting_with
from opensan.cli.terminal import UsageError, complain, output_console, progress_of
from opensan.vocabulary import Vocabulary, ready_sets
from opensan.word_lists import word_list

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter

WORDS = "Words"
"""Group of options in the help."""

Words = Annotated[
    list[str] | None,
    typer.Option(
        "--words",
        "-w",
        help='What to look for: "road, car|automobile|taxi, sky" (| joins synonyms). May be given several times.',
        show_default=False,
        rich_help_panel=WORDS,
    ),
]
WordsFile = Annotated[
    list[Path] | None,
    typer.Option(
        help="The words from a file: a word a line, JSON, or YAML.", show_default=False, rich_help_panel=WORDS
    ),
]
WordsSet = Annotated[
    list[str] | None,
    typer.Option(
        help="A ready label set; `opensan words` lists them.",
        show_default=False,
        rich_help_panel=WORDS,
        autocompletion=lambda incomplete: starting_with(incomplete, ready_sets()),
    ),
]
Background = Annotated[
    list[str] | None,
    typer.Option(
        help="Words whose pixels are reported as unlabelled. May be given several times.",
        show_default=False,
        rich_help_panel=WORDS,
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompts: vild (the default), single, or a file with one a line.",
        show_default=False,
        rich_help_panel=WORDS,
    ),
]

Rest = Annotated[
    bool,
    typer.Option("--rest", help="Leave pixels that none of the words deserves unlabelled.", rich_help_panel=WORDS),
]

_SEPARATOR = re.compile(r"[/•·>+&]|\s-\s|\sand\s|\s{2}", re.IGNORECASE)
"""The characters that people also write between words."""

T = TypeVar("T")


def asked_vocabulary(
    words: Sequence[str] | None,
    words_file: Sequence[Path] | None,
    words_set: Sequence[str] | None,
    background: Sequence[str] | None,
    templates: Sequence[str] | None,
    rest: bool = False,
) -> Vocabulary:
    """Return the vocabulary of a command's options. Raises UsageError unless they give words in exactly one way.

    With `rest`, one word may stand alone.
    """
    given = {"--words": words, "--words-file": words_file, "--words-set": words_set}
    if sum(bool(value) for value in given.values()) != 1:
        raise UsageError(f"give the words by exactly one of {', '.join(given)}")
    more = _more(background, templates)
    if (file := _single("--words-file", words_file)) is not None:
        vocabulary = Vocabulary.from_file(file, **more)
    elif (ready := _single("--words-set", words_set)) is not None:
        vocabulary = Vocabulary.ready(ready, **more)
    else:
        vocabulary = Vocabulary.parse(_joined("--words", words), **more)
    (*others, word) = vocabulary.words
    if not others and not rest and (len(word.synonyms) > 1 or _SEPARATOR.search(word.name)):
        said = "|".join(word.synonyms)
        complain(f"warning: {said!r} is all one word, which gets every pixel: separate words by commas")
    return vocabulary


def vocabularies(background: Sequence[str] | None, templates: Sequence[str] | None) -> Callable[[object], Vocabulary]:
    """Return the function that makes a vocabulary of words that come later, with a command's other options."""
    return partial(Vocabulary.parse, **_more(background, templates))


def _more(background: Sequence[str] | None, templates: Sequence[str] | None) -> dict[str, Any]:
    return {"background": _joined("--background", background), "templates": _single("--templates", templates)}


def embed_words(segmenter: "Segmenter", vocabulary: Vocabulary) -> None:
    """Embed the words before the images are read: it may take long, and unusable words are reported early."""
    with progress_of(output_console(), "embedding prompts") as progress:
        segmenter.prepare_words(vocabulary, progress)
    segmenter.check_calibration(vocabulary)


def _joined(option: str, texts: Sequence[str] | None) -> Any:
    """Join the lists of an option that was given several times."""
    if not texts:
        return ()
    if len(texts) == 1:
        return texts[0]
    lists = [word_list(text) for text in texts]
    if not all(isinstance(listed, list) for listed in lists):
        raise UsageError(f"{option}: a JSON object is a whole vocabulary: give it alone")
    return [word for listed in lists for word in listed]


def _single(option: str, values: Sequence[T] | None) -> T | None:
    """Return the value of an option that is not a list; the command line would silently drop all but the last."""
    if values and len(values) > 1:
        raise UsageError(f"{option} was given {len(values)} times: choose one")
    return values[0] if values else None
