"""ImageNet's 1,000 classes in WordNet's noun hierarchy: which words name which classes.

WordNet 3.0's database is Debian's package `wordnet-base`; ImageNet's synset numbers are its offsets.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Synset:
    """A meaning."""

    lemmas: tuple[str, ...]
    """The words for it, the usual one first."""
    parents: tuple[int, ...]
    """Offsets of the wider meanings."""


class WordNet:
    """Nouns of WordNet."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds data.noun and index.noun."""
        self.synsets: dict[int, Synset] = {}
        for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                offset, synset = _parse(line)
                self.synsets[offset] = synset
        self.senses: dict[str, tuple[int, ...]] = {}
        self.in_use: set[str] = set()
        """Words that occur in the texts whose meanings WordNet's authors have marked."""
        for line in (folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                parts = line.split()
                count = int(parts[2])
                lemma = parts[0].replace("_", " ")
                self.senses[lemma] = tuple(int(offset) for offset in parts[-count:])
                if int(parts[-count - 1]):
                    self.in_use.add(lemma)


def _parse(line: str) -> tuple[int, Synset]:
    parts = line.partition(" | ")[0].split()
    count = int(parts[3], 16)
    lemmas = tuple(parts[4 + 2 * i].replace("_", " ") for i in range(count))
    pointers = parts[4 + 2 * count :]
    parents = tuple(int(pointers[1 + 4 * i + 1]) for i in range(int(pointers[0])) if pointers[1 + 4 * i] in ("@", "@i"))
    return int(parts[0]), Synset(lemmas, parents)


class ImageNetWords:
    """ImageNet's classes and every wider meaning."""

    def __init__(self, wordnet: WordNet, synsets: list[str]) -> None:
        """`synsets`: "n01440764", ... in the order of the classifier's rows."""
        self.wordnet = wordnet
        self.classes = [int(synset[1:]) for synset in synsets]
        below: dict[int, set[int]] = {}
        for index, offset in enumerate(self.classes):
            pending, seen = [offset], set()
            while pending:
                ancestor = pending.pop()
                if ancestor not in seen:
                    seen.add(ancestor)
                    below.setdefault(ancestor, set()).add(index)
                    pending.extend(wordnet.synsets[ancestor].parents)
        self.below = {offset: tuple(sorted(rows)) for offset, rows in below.items()}
        """Synset -> the classes (rows) that are kinds of it, itself included."""

    @cached_property
    def meaning(self) -> dict[str, int]:
        """A word in lower case -> the synset that it names: the first of its senses that has classes below.

        A class's own names come first: "mouse" is the animal for WordNet, and a class of ImageNet only as a device.
        """
        offset_of: dict[str, int] = {}
        for offset in self.classes:
            for lemma in self.wordnet.synsets[offset].lemmas[:1]:
                offset_of.setdefault(lemma.lower(), offset)
        for offset in self.below:
            for lemma in self.wordnet.synsets[offset].lemmas:
                word = lemma.lower()
                if word not in offset_of:
                    offset_of[word] = next(
                        (sense for sense in self.wordnet.senses[word] if sense in self.below), offset
                    )
        return offset_of

    def wider(self, word: str, steps: int) -> int | None:
        """Find the nearest synset with classes below that is at most `steps` above the first meaning of `word`."""
        level = [self.wordnet.senses[word][0]]
        for _ in range(steps + 1):
            known = [offset for offset in level if offset in self.below]
            if known:
                return known[0]
            level = [parent for offset in level for parent in self.wordnet.synsets[offset].parents]
        return None
