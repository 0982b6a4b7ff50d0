"""Vocabularies: an ordered list of words (classes) with synonyms, and the prompts that CLIP reads for them.

Letters: K words (classes), R text rows (one for each synonym of each word). Nothing here needs torch.
"""

import functools
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensan.buckets import bucket_path
from opensan.errors import UserError, short
from opensan.files import ASSETS
from opensan.word_lists import (
    TunedWords,
    lines_of,
    listed_names,
    read_text,
    read_words,
    without_invisible,
    word_list,
)

UNLABELLED = -1
"""The label of pixels without a word: those of absorbing (background) words."""

REST = "none of these"
"""Name of the background word that `Vocabulary.with_rest` adds."""

MOST_NOTHING = 10
"""The most that a word may have of the probability of "no object", as a factor of it."""

MAX_WORDS = 65_534
"""Label maps are written as 16-bit PNG at most, with 65,535 for unlabelled."""

TEMPLATE_SETS = {
    "single": ("a photo of a {}.",),
    # The 14 prompts of ViLD (Gu et al., ICLR 2022) that SAN is trained and tested with; missing full stops are theirs.
    "vild": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        "a photo of a small {}.",
        "a photo of a medium {}.",
        "a photo of a large {}.",
        "This is a photo of a small {}.",
        "This is a photo of a medium {}.",
        "This is a photo of a large {}.",
        "There is a small {} in the scene.",
        "There is a medium {} in the scene.",
        "There is a large {} in the scene.",
    ),
}

Templates = str | os.PathLike[str] | Sequence[str]
"""The name of a template set, a text file with one template a line, or the templates themselves."""

_CLASSES = ASSETS / "classes"
_WORD_KEYS = {"name", "text", "synonyms", "prompts", "background", "nothing"}
_VOCABULARY_KEYS = {"words", "background", "templates", "tuned"}
# Control characters would reach the terminal; a line break would split a word in files with a word a line;
# lone surrogates (undecodable bytes of a command line) can't be written.
_BAR = re.compile("[|｜]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Word:
    """One word (class). Invisible characters (zero-width spaces and the like) are removed from all texts.

    Raises ValueError, one line, if synonyms or prompts are a single text.
    """

    name: str
    """Display name in results."""
    synonyms: tuple[str, ...] = ()
    """Texts for CLIP: one text row each; the word's score is that of the best one. Empty: the name alone."""
    prompts: tuple[str, ...] | None = None
    """Full sentences that replace the templates for the first synonym (the others keep the templates)."""
    absorbs: bool = False
    """A background or "other" word: it takes pixels, and they are reported as unlabelled."""
    nothing: float = 0.0
    """Factor by which a background word without a text of its own gets the probability of "no object", in [0, 10]; 0
    for all other words."""

    def __post_init__(self):
        for field in ("synonyms", "prompts"):
            if isinstance(texts := getattr(self, field), str):
                raise UserError(f"{field} of {short(self.name)} must be a list of texts, not {short(texts)}")
        object.__setattr__(self, "name", _visible(self.name))
        object.__setattr__(self, "synonyms", tuple(map(_visible, self.synonyms)) or (self.name,))
        object.__setattr__(self, "prompts", self.prompts and tuple(map(_visible, self.prompts)))


@dataclass(frozen=True)
class Vocabulary:
    """An ordered, checked list of words and the templates that turn them into sentences.

    Absorbing words are moved to the end, so that labels 0..len(names)-1 are the words to report.
    Names are used as given: neither lower-cased nor reordered (the tokenizer lower-cases by itself).
    Raises ValueError, one line, on an empty list, more than 65,534 words, blank or repeated names, or a bad template.
    """

    words: tuple[Word, ...]
    templates: tuple[str, ...] = TEMPLATE_SETS["vild"]
    tuned: TunedWords | None = None
    """Vectors that were found on labelled images, for one model alone; None: all rows are what the text half makes."""

    def __post_init__(self):
        _check_words(self.words, list(_places(self.words)))
        _check_templates(self.templates)
        object.__setattr__(self, "words", tuple(sorted(self.words, key=lambda word: word.absorbs)))
        object.__setattr__(self, "templates", tuple(self.templates))

    @functools.cached_property
    def names(self) -> list[str]:
        """Display names of the words that are reported; a label is an index into this list."""
        return [word.name for word in self.words if not word.absorbs]

    @functools.cached_property
    def nothing(self) -> tuple[tuple[int, float], ...]:
        """The words (indices) that have a share of the probability of "no object", and these shares."""
        return tuple((index, word.nothing) for index, word in enumerate(self.words) if word.nothing)

    @property
    def row_class(self) -> list[int]:
        """[R] the class (0..K-1, absorbing words included) of each text row; ascending."""
        return [index for index, word in enumerate(self.words) for _ in word.synonyms]

    @functools.cached_property
    def tuned_rows(self) -> dict[int, bytes]:
        """The rows (0..R-1) that `tuned` has a vector for, and the vectors."""
        if self.tuned is None:
            return {}
        known = {_key(text): vector for text, vector in self.tuned.rows}
        texts = (text for word in self.words for text in word.synonyms)
        return {row: known[key] for row, text in enumerate(texts) if (key := _key(text)) in known}

    def find(self, text: str) -> int | None:
        """Return the index in `words` of the word with this name or synonym; None if there is none."""
        return self._places.get(_key(text))

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {_key(text): n for n, word in enumerate(self.words) for text in (word.name, *word.synonyms)}

    def with_rest(self, share: float) -> "Vocabulary":
        """Add a background word for what none of the words fits, with `share` of "no object" (`Word.nothing`).

        The text of the first word stands in for its own.
        """
        first = self.words[0]
        sentences = first.prompts or tuple(template.replace("{}", first.synonyms[0]) for template in self.templates)
        taken = {_key(text) for word in self.words for text in (word.name, *word.synonyms)}
        name = next(name for count in itertools.count() if _key(name := REST + " +" * count) not in taken)
        return replace(self, words=(*self.words, Word(name, prompts=sentences, absorbs=True, nothing=share)))

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each of the R text rows, in `row_class`'s order; a row is the mean of its prompts."""
        rows: list[list[str]] = []
        for word in self.words:
            for number, synonym in enumerate(word.synonyms):
                if word.prompts and number == 0:
                    rows.append(list(word.prompts))
                else:
                    rows.append([template.replace("{}", synonym) for template in self.templates])
        return rows

    @classmethod
    def parse(cls, spec: object, *, background: object = (), templates: Templates | None = None) -> "Vocabulary":
        """Make a vocabulary from words in any of these forms.

        Args:
            spec: one of

                - a string `"road, car|automobile|taxi, sky"`: commas (or semicolons, line breaks, and their like in
                  other scripts) separate words, `|` separates synonyms, the first of which is the display name. A word
                  in quotation marks may hold commas;
                - a string that is a JSON or Python list, `'["road", "sky"]'`: what that list is;
                - a list of such names, in which a comma is part of the name: `["road, route", "car|taxi"]`;
                - a list of dicts with `"name"` and, if wanted, `"text"` (what prompts say instead of the name),
                  `"synonyms"`, `"prompts"`, `"background"`;
                - a dict as `to_dict` makes it, the path (os.PathLike) of a file (`from_file`), or a Vocabulary.
            background: absorbing words: a string or a list.
            templates: "vild" (the default), "single", a file with a template a line, or a list.

        Raises:
            ValueError: one line naming the word.
        """
        if isinstance(spec, os.PathLike):
            return cls.from_file(spec, background=background, templates=templates)
        if isinstance(spec, str):
            spec = word_list(spec)
        tuned = None
        if isinstance(spec, Vocabulary):
            words, own_templates, tuned = spec.words, spec.templates, spec.tuned
        elif isinstance(spec, Mapping):
            words, own_templates = _words_and_templates(spec)
            tuned = TunedWords.parse(spec["tuned"]) if "tuned" in spec else None
        else:
            words, own_templates = _words(spec), TEMPLATE_SETS["vild"]
        absorbing = tuple(replace(word, absorbs=True) for word in _words(background))
        if isinstance(spec, Vocabulary) and not absorbing and templates is None:
            return spec
        return cls(words + absorbing, own_templates if templates is None else _templates(templates), tuned)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, background: object = (), templates: Templates | None = None
    ) -> "Vocabulary":
        """Read a word file (UTF-8, or UTF-16 with its byte order mark; at most 32 MiB).

        Args:
            path: `.json` and `.yaml` hold a list as in `parse`, `{"names": [...]}` like the ready sets, or an object
                with "words", "background", "templates" and "tuned" (which may name a file that `opensan tune words`
                wrote, beside this one). Anything else is text, a word a line: `|` separates
                synonyms, commas belong to the name, blank lines are skipped, and `#` at the start of a line or after
                white space begins a comment.
            background: as in `parse`.
            templates: as in `parse`.

        Raises:
            ValueError: one line naming the file and the place.
        """
        path = bucket_path(path) or Path(path)
        try:
            spec, places = read_words(path)
            if places is not None:
                spec = tuple(_named(text, source) for text, source in zip(spec, places, strict=True))
                _check_words(spec, places)
            elif isinstance(spec, Mapping) and isinstance(file := spec.get("tuned"), str):
                spec = {**spec, "tuned": TunedWords.from_file(path.parent / file).to_dict()}
            return cls.parse(spec, background=background, templates=templates)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def ready(cls, name: str, *, background: object = (), templates: Templates | None = None) -> "Vocabulary":
        """Return one of the benchmarks' label sets, in its training order; `ready_sets()` lists them."""
        if name not in ready_sets():
            raise UserError(f"no ready label set is called {short(name)}: choose from {', '.join(ready_sets())}")
        return cls.from_file(_CLASSES / f"{name}.json", background=background, templates=templates)

    def to_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """Return plain data for JSON; `parse` reads it back to an equal vocabulary.

        Of tuned words, it holds the checksum of the vectors, or these themselves if `vectors`: only then it can be
        read back.
        """
        plain: dict[str, Any] = {
            "words": [_word_to_plain(word) for word in self.words if not word.absorbs],
            "background": [_word_to_plain(word) for word in self.words if word.absorbs],
            "templates": list(self.templates),
        }
        if self.tuned is not None:
            digest = {"model": self.tuned.model, "sha256": self.tuned.digest}
            plain["tuned"] = self.tuned.to_dict() if vectors else digest
        return plain


def ready_source_ids(name: str) -> list[int] | None:
    """Return the data set's own numbers of a ready set's classes, in its training order; None without any."""
    return json.loads((_CLASSES / f"{name}.json").read_text(encoding="utf-8")).get("source_ids")


def ready_sets() -> list[str]:
    """Return the names of the label sets that `Vocabulary.ready` knows."""
    return sorted(path.stem for path in _CLASSES.glob("*.json"))


def _words(spec: object) -> tuple[Word, ...]:
    """Return the words of a text or of a list, not yet checked."""
    if isinstance(spec, str):
        spec = word_list(spec)
    if isinstance(spec, list | tuple):
        return tuple(_word(entry, f"word {n}") for n, entry in enumerate(spec, 1))
    raise UserError(f"words must be a string or a list, not {type(spec).__name__} ({short(spec)})")


def _word(entry: object, source: str) -> Word:
    """Make a word from an entry of a list."""
    if isinstance(entry, Word):
        return entry
    if isinstance(entry, str):
        return _named(entry, source)
    if not isinstance(entry, Mapping):
        hint = (
            ", or in quotation marks" if isinstance(entry, bool | int | float | None) else ""
        )  # YAML reads "no" as False
        raise UserError(f'{source} is {short(entry)}: a word is text{hint}, or a dict with "name"')
    for key in entry:
        if key not in _WORD_KEYS:
            raise UserError(f"{source} has an unknown key {short(key)}: known are {', '.join(sorted(_WORD_KEYS))}")
    if not isinstance(entry.get("name"), str):
        raise UserError(f'{source} needs a "name" that is text, not {short(entry.get("name"))}')
    source = f"{source} ({short(entry['name'])})"
    text = entry.get("text", entry["name"])
    if not isinstance(text, str):
        raise UserError(f'{source}: "text" must be text, not {short(text)}')
    if not isinstance(entry.get("background", False), bool):
        raise UserError(f'{source}: "background" must be true or false, not {short(entry["background"])}')
    nothing = entry.get("nothing", 0.0)
    if isinstance(nothing, bool) or not isinstance(nothing, int | float) or not 0 <= nothing <= MOST_NOTHING:
        raise UserError(f'{source}: "nothing" must be a factor from 0 to {MOST_NOTHING}, not {short(nothing)}')
    prompts = _texts(entry, "prompts", source)
    synonyms = (text, *_texts(entry, "synonyms", source))
    return Word(entry["name"], synonyms, prompts or None, entry.get("background", False), float(nothing))


def _texts(entry: Mapping, key: str, source: str) -> tuple[str, ...]:
    texts = entry.get(key) or ()
    if isinstance(texts, str) or not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise UserError(f'{source}: "{key}" must be a list of texts, not {short(texts)}')
    return tuple(texts)


def _named(text: str, source: str) -> Word:
    """Make a word of "car|automobile|taxi": it is called "car" and has three synonyms."""
    if not _BAR.search(text):
        return Word(text)
    synonyms = tuple(part.strip() for part in _BAR.split(without_invisible(text)))
    if not all(synonyms):
        raise UserError(f"{source} ({short(text)}): synonym {synonyms.index('') + 1} is blank")
    return Word(synonyms[0], synonyms)


def _words_and_templates(data: Mapping) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the content of a JSON object: a ready set's {"names"} or {"words", "background", "templates"}."""
    if "names" in data and "words" not in data:
        return _words(_list_of({"names": listed_names(data["names"])}, "names")), TEMPLATE_SETS["vild"]
    for key in data:
        if key not in _VOCABULARY_KEYS:
            raise UserError(
                f'unknown key {short(key)}: a vocabulary has "words", "background", "templates" and "tuned"'
            )
    background = _words(_list_of(data, "background")) if "background" in data else ()
    templates = data.get("templates", "vild")
    # Data from other people may name a template set, but not a file to read.
    if isinstance(templates, str) and templates not in TEMPLATE_SETS:
        raise UserError(f'"templates" must be {_set_names()} or a list, not {short(templates)}')
    absorbing = tuple(replace(word, absorbs=True) for word in background)
    return _words(_list_of(data, "words")) + absorbing, _templates(templates)


def _list_of(data: Mapping, key: str) -> list | tuple:
    if not isinstance(data.get(key), list | tuple):
        raise UserError(f'"{key}" must be a list of words, not {short(data.get(key))}')
    return data[key]


def _word_to_plain(word: Word) -> str | dict[str, Any]:
    """Return the shortest entry that `_word` reads back to an equal word (except for `absorbs`)."""
    if word.synonyms == (word.name,) and word.prompts is None and not word.nothing and not _BAR.search(word.name):
        return word.name
    plain: dict[str, Any] = {"name": word.name}
    if word.synonyms[0] != word.name:
        plain["text"] = word.synonyms[0]
    if word.synonyms[1:]:
        plain["synonyms"] = list(word.synonyms[1:])
    if word.prompts:
        plain["prompts"] = list(word.prompts)
    if word.nothing:
        plain["nothing"] = word.nothing
    return plain


def _places(words: Iterable[Word]) -> Iterator[str]:
    """Return each word's name for errors: "word 3", or "background word 1"."""
    absorbing = 0
    for number, word in enumerate(words, 1):
        absorbing += word.absorbs
        yield f"background word {absorbing}" if word.absorbs else f"word {number}"


def _check_words(words: Sequence[Word], places: Sequence[str]) -> None:
    """Raise ValueError unless the words are few enough, readable, and all different."""
    if not words or all(word.absorbs for word in words):
        raise UserError(
            "the vocabulary is empty: give at least one word" + (" besides the background" if words else "")
        )
    if len(words) > MAX_WORDS:
        raise UserError(f"{len(words):,} words are too many: a label map holds at most {MAX_WORDS:,}")
    owner: dict[str, int] = {}
    for index, word in enumerate(words):
        _check_text(word.name, places[index])
        for text in word.synonyms:
            _check_text(text, f"{places[index]} ({short(word.name)}): a synonym")
        for text in word.prompts or ():
            _check_text(text, f"{places[index]} ({short(word.name)}): a prompt")
        texts = word.synonyms if word.name in word.synonyms else (*word.synonyms, word.name)
        own = set()
        for text in texts:
            key = _key(text)
            first = owner.setdefault(key, index)
            if key in own:
                raise UserError(f"{places[index]} ({short(word.name)}): synonym {short(text)} stands there twice")
            if first != index:
                synonym = "" if text == word.name else f" (synonym {short(text)})"
                raise UserError(
                    f"{places[index]} {short(word.name)}{synonym} repeats {places[first]} {short(words[first].name)}"
                )
            own.add(key)


def _check_text(text: object, source: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{source} is {short(text)}: it must be text")
    if not text.strip():
        raise UserError(f"{source} is blank")
    if _UNPRINTABLE.search(text):
        raise UserError(f"{source} ({short(text)}) has a line break or control character, or is not valid text")


def _visible(text: object) -> object:
    return without_invisible(text) if isinstance(text, str) else text


def _key(text: str) -> str:
    """Return a key that is equal for equal words: case, spacing and the encoding of accents do not change tokens."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _templates(spec: Templates) -> tuple[str, ...]:
    """Return the templates of a set's name, of a file with one a line, or of a list. Vocabulary checks them."""
    if isinstance(spec, str) and spec in TEMPLATE_SETS:
        return TEMPLATE_SETS[spec]
    if isinstance(spec, str) and ("{}" in spec or not re.search(r"[./\\]", spec)):
        raise UserError(f"unknown template set {short(spec)}: choose {_set_names()}, or give a text file or a list")
    if isinstance(spec, str | os.PathLike):
        path = Path(spec)
        try:
            templates = tuple(line for _, line in lines_of(read_text(path)))
            _check_templates(templates)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return templates
    if isinstance(spec, list | tuple):
        return tuple(spec)
    raise UserError(f"templates must be {_set_names()}, a text file or a list, not {short(spec)}")


def _check_templates(templates: Sequence[str]) -> None:
    if not templates:
        raise UserError('no prompt templates: give at least one, such as "a photo of a {}."')
    first: dict[str, int] = {}
    for number, template in enumerate(templates, 1):
        _check_text(template, f"template {number}")
        if template.count("{}") != 1:
            raise UserError(f'template {number} {short(template)} must hold "{{}}" exactly once, where the word goes')
        if first.setdefault(template, number) != number:
            raise UserError(f"template {number} {short(template)} repeats template {first[template]}")


def _set_names() -> str:
    return " or ".join(f'"{name}"' for name in TEMPLATE_SETS)
