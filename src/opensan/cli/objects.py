"""Options of commands for objects, and their table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.choices import Objects
from opensan.cli.terminal import UsageError
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary
from opensan.word_lists import word_list

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.assemble.segments import SegmentRules, Segments

OBJECTS = "Objects"
"""Group of options in the help."""


Stuff = Annotated[
    list[str] | None,
    typer.Option(
        help="Words that are stuff: all their pixels are one region. Default: as COCO and ADE20K have them.",
        show_default=False,
        rich_help_panel=OBJECTS,
    ),
]
Things = Annotated[
    list[str] | None,
    typer.Option(
        help="Words that are things: each object is a segment. Default: all words that are not known as stuff.",
        show_default=False,
        rich_help_panel=OBJECTS,
    ),
]
ObjectsBy = Annotated[
    Objects,
    typer.Option(
        help="Objects of a word are its connected parts (a stop-gap for weights trained on regions, as all that are "
        "published), or the model's proposals (for weights trained on objects).",
        rich_help_panel=OBJECTS,
    ),
]
LeastScore = Annotated[
    float, typer.Option(help="Least probability of a proposal's word, 0 to 1.", rich_help_panel=OBJECTS)
]
LeastMask = Annotated[float, typer.Option(help="Least mask of a proposal's pixels, 0 to 1.", rich_help_panel=OBJECTS)]
LeastOverlap = Annotated[
    float, typer.Option(help="Least share of its area that a proposal must win, 0 to 1.", rich_help_panel=OBJECTS)
]


def asked_rules(
    vocabulary: Vocabulary | None,
    formats: Sequence[str],
    stuff: Sequence[str] | None,
    things: Sequence[str] | None,
    objects: Objects,
    score: float,
    mask: float,
    overlap: float,
) -> "SegmentRules":
    """Return the rules of a command's options. Raises UsageError if they are wrong, or if no format needs them.

    Without a vocabulary it is not checked whether the words named as stuff or things are among the words.
    """
    from opensan.assemble.kinds import word_kinds
    from opensan.assemble.segments import USUAL_RULES, SegmentRules

    try:
        rules = SegmentRules(score, mask, overlap, objects == "parts", stuff=_names(stuff), things=_names(things))
        if vocabulary is not None:
            word_kinds(vocabulary, rules.stuff, rules.things)
    except UserError as error:
        raise UsageError(str(error)) from None
    if rules != USUAL_RULES and not has_segments(formats):
        from opensan.outputs import SEGMENT_FORMATS

        raise UsageError(f"options for objects need a --format that is made of objects: {', '.join(SEGMENT_FORMATS)}")
    return rules


def has_segments(formats: Sequence[str]) -> bool:
    """Return whether a format is made of segments."""
    from opensan.outputs import SEGMENT_FORMATS

    return any(name in SEGMENT_FORMATS for name in formats)


def segments_table(segments: "Segments") -> "Table":
    """Return a table of the segments by word, saying how objects were told apart and what decided on stuff."""
    from rich import box
    from rich.table import Table

    from opensan.assemble.segments import WAYS

    table = Table(
        "word",
        "kind",
        "segments",
        box=box.SIMPLE,
        title=f"objects by {WAYS[segments.rules.parts]}",
        title_justify="left",
    )
    for word, kind in segments.kinds.items():
        table.add_row(word, f"{kind.kind} ({kind.because})", str(len(segments.of(word))))
    return table


def _names(lists: Sequence[str] | None) -> tuple[str, ...]:
    """Return the words of lists with commas."""
    return tuple(str(word) for text in lists or () for word in word_list(text))
