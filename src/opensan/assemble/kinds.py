"""Decide which words are things, of which there are objects, and which are stuff, of which there is one region."""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass

from opensan.errors import UserError, did_you_mean, short
from opensan.files import ASSETS
from opensan.vocabulary import Vocabulary

LISTS = {"COCO": "coco_stuff_171", "ADE20K": "ade20k_150"}
"""The bundled label sets that say of each class whether it is a thing."""

_ENDINGS = ("-other", "-stuff")
"""Endings of COCO-Stuff's names, which nobody asks with: "sky-other"."""


@dataclass(frozen=True)
class KindOfWord:
    """Whether a word is stuff or a thing, and why."""

    kind: str
    """ "thing" or "stuff"."""
    because: str
    """ "asked", the names of the bundled lists, or "no list has it"."""


def word_kinds(vocabulary: Vocabulary, stuff: Iterable[str] = (), things: Iterable[str] = ()) -> dict[str, KindOfWord]:
    """Return what each reported word is, in the vocabulary's order.

    A word is what `stuff` or `things` (names) say. Else it is a thing if COCO's or ADE20K's list has it (or one of its
    synonyms) as a thing; else stuff if one of them has it as stuff; else a thing.

    Raises UserError, one line, for a name that is not a word of the vocabulary.
    """
    asked = {name: "stuff" for name in stuff} | {name: "thing" for name in things}
    for name, kind in asked.items():
        if name not in vocabulary.names:
            hint = did_you_mean(name, vocabulary.names) if isinstance(name, str) else ""
            raise UserError(f"{short(name)} is marked as {kind} but is no word that is asked for{hint}")
    kinds = {}
    for word in vocabulary.words[: len(vocabulary.names)]:
        if word.name in asked:
            kinds[word.name] = KindOfWord(asked[word.name], "asked")
        else:
            kinds[word.name] = _listed({word.name, *word.synonyms})
    return kinds


def _listed(texts: Iterable[str]) -> KindOfWord:
    """Return what the bundled lists say of a word with these texts."""
    keys = {text.lower().strip() for text in texts}
    for kind, is_thing in (("thing", True), ("stuff", False)):
        lists = [label for label, names in _lists().items() if any(names.get(key) == is_thing for key in keys)]
        if lists:
            return KindOfWord(kind, " and ".join(lists))
    return KindOfWord("thing", "no list has it")


@functools.cache
def _lists() -> dict[str, dict[str, bool]]:
    """Return for each bundled list: lower-case name (synonyms apart) -> whether it is a thing."""
    return {label: _names_of(name) for label, name in LISTS.items()}


def _names_of(list_name: str) -> dict[str, bool]:
    data = json.loads((ASSETS / "classes" / f"{list_name}.json").read_text(encoding="utf-8"))
    names: dict[str, bool] = {}
    for entry, thing in zip(data["names"], data["is_thing"], strict=True):
        for text in str(entry).split(","):
            key = text.strip().lower()
            keys = {key, *(key.removesuffix(ending) for ending in _ENDINGS)}
            if not thing and "-" in key:
                keys.add(key.split("-")[0])  # "wall-brick" is a wall
            for each in keys:
                names[each] = names.get(each, False) or bool(thing)
    return names
