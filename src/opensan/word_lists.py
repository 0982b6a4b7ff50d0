"""Read lists of words: a line of text, a JSON or Python list, a text, JSON or YAML file.

Commands, Python, the service and files all read words here, so that one rule holds everywhere.
"""

import ast
import base64
import binascii
import codecs
import hashlib
import html
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensan.errors import UserError, short

MAX_FILE_BYTES = 32 * 2**20
"""Longer word files are refused unread; 65,534 words take a megabyte or two."""

MAX_YAML_BYTES = 2**20
"""Limit for YAML, which is read a hundred times more slowly than JSON."""

_COMMAS = ",，、،﹐､"
_SEMICOLONS = ";；؛"
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "「": "」", "‘": "’", "`": "`"}
_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z][a-z0-9]*);", re.IGNORECASE)
# Invisible characters, which words copied from a page or a chat may contain: they would make another word.
_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
# Joiners have a meaning only inside scripts and emoji that use them.
_STRAY_JOINER = re.compile("(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")
_FILE = re.compile(r"^(?:[a-z]:[\\/]|~?/|\.{1,2}[\\/]|\\\\)|\.(?:txt|json|ya?ml|csv|tsv)$", re.IGNORECASE)
_NUMBERED = re.compile(r"^\d+\s*(?:[:=]\s*|[.)]\s+)\D|^\D[^:=]*[:=]\s*\d+$")
_BULLET = re.compile(r"[-*•]\s")
_NUMBERS_REMEDY = "give the names alone; in a list of classes, put the number before each (0: road)"
_BESIDE_NUMBER = re.compile(r"(?P<first>\d+\s+)?(?P<name>\S.*?)(?P<last>\s+\d+)?")
"""A line of a word file, and a number that stands before or behind the word."""
_HEADINGS = {"name", "names", "word", "words", "class", "classes", "label", "labels", "category", "categories"}


_TUNED_KEYS = {"model", "image", "text", "rows", "context", "about"}
_MOST_TUNED_BYTES = 1 << 15
"""Bytes of one vector: 16,384 numbers."""


@dataclass(frozen=True)
class TunedWords:
    """Vectors that take the place of words' text rows, or are added to them, in one model (`opensan tune words`).

    A vector is D float16 numbers, little-endian. Nothing here knows D: the model that they are used with checks it.
    """

    model: str
    """Name of the model; for people."""
    image: str
    """Hash of the image half of the model."""
    text: str
    """Hash of its text half."""
    rows: tuple[tuple[str, bytes], ...] = ()
    """(text, vector): the row of a word's text (name or synonym), in the place of what the text half makes of it."""
    context: bytes | None = None
    """A vector that is added to the rows of all other texts, before they are brought to unit length; None: nothing."""
    about: str = "{}"
    """How the vectors were found, as JSON; for people."""

    @property
    def digest(self) -> str:
        """Hash of all that answers depend on, 64 hexadecimal digits."""
        parts = (self.image, self.text, self.rows, self.context)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def parse(cls, data: object) -> "TunedWords":
        """Read plain data that `to_dict` made. Raises UserError, one line, on any other."""
        if isinstance(data, Mapping) and set(data) == {"model", "sha256"}:
            raise UserError(
                '"tuned" names its vectors by their checksum alone, as results do: give the word file of '
                "`opensan tune words`, which holds them"
            )
        wanted = 'an object with "model", "image", "text" and "rows", which `opensan tune words` writes'
        if not isinstance(data, Mapping) or not {"image", "text"} <= set(data) <= _TUNED_KEYS:
            raise UserError(f'"tuned" must be {wanted}, not {short(data)}')
        rows = data.get("rows", {})
        texts = [data.get(key, "") for key in ("model", "image", "text")]
        if not isinstance(rows, Mapping) or not all(isinstance(text, str) for text in (*texts, *rows)):
            raise UserError(f'"tuned" must be {wanted}')
        context = data.get("context")
        model, image, text = texts
        return cls(
            model,
            image,
            text,
            rows=tuple((text, _vector(vector, short(text))) for text, vector in rows.items()),
            context=None if context is None else _vector(context, "the context"),
            about=json.dumps(data.get("about", {}), sort_keys=True, ensure_ascii=False),
        )

    @classmethod
    def from_file(cls, path: Path) -> "TunedWords":
        """Read the vectors of a word file that `opensan tune words` wrote. Raises UserError, one line."""
        try:
            data = _from_json(read_text(path))
            if not isinstance(data, Mapping) or not isinstance(data.get("tuned"), Mapping):
                raise UserError("holds no tuned words; `opensan tune words` writes such files")
            return cls.parse(data["tuned"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `parse` reads it back to equal vectors."""
        plain: dict[str, Any] = {"model": self.model, "image": self.image, "text": self.text}
        if about := json.loads(self.about):
            plain["about"] = about
        if self.context is not None:
            plain["context"] = base64.b64encode(self.context).decode()
        plain["rows"] = {text: base64.b64encode(vector).decode() for text, vector in self.rows}
        return plain


def _vector(text: object, of: str) -> bytes:
    """Return the bytes of a vector in base64. Raises UserError, one line."""
    try:
        vector = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        vector = b""
    if not vector or len(vector) % 2 or len(vector) > _MOST_TUNED_BYTES:
        raise UserError(f'"tuned": the vector of {of} is damaged: it must be float16 numbers in base64')
    return vector


def word_list(text: str) -> Any:
    """Return the words that a text lists: plain entries, as a JSON file may hold them, not yet checked.

    Commas separate words (also `、`, `，` and line breaks; or semicolons, if there is no comma). A word in quotation
    marks may hold them. A text that begins with a bracket is a JSON or Python list, or a JSON object.

    Raises:
        UserError: one line; the text is no list of words, or it is not clear which.
    """
    text = _INVISIBLE.sub("", text).strip()
    if any(html.unescape(entity) != entity for entity in _ENTITY.findall(text)):
        raise UserError(f"{short(text)} is text of a web page's source: write {short(html.unescape(text))}")
    if text[:1] in ("[", "{") or re.match(r"\(\s*['\"]", text):
        return _literal(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    parts: list[str] = []
    used: set[str] = set()
    for number, line in enumerate(lines, 1):
        pieces = _split(line, used)
        if number < len(lines) and pieces[-1] == "":  # "road,\ncar": the line break adds nothing to the comma
            pieces.pop()
        parts += pieces
    if used & set(_COMMAS) and used & set(_SEMICOLONS):
        raise UserError(
            f"{short(text)} has commas and semicolons: separate words by one of them, and put a word that holds the "
            'other in quotation marks ("...")'
        )
    if parts and parts[0][:1] == "'" and parts[-1][-1:] == "'" and len(parts) > 1 and parts[0][-1:] != "'":
        raise UserError(f"all words stand in one pair of quotation marks ({short(text)}): leave these out")
    parts = [part[1:-1].strip() if len(part) > 2 and part[0] == part[-1] == "'" else part for part in parts]
    for number, part in enumerate(parts, 1):
        _refuse_no_word(part, f"word {number}")
    return parts


def read_words(path: Path) -> tuple[Any, list[str] | None]:
    """Read the words of a file: its entries, and for a text file the name of each in errors ("line 7").

    Raises:
        UserError: one line, without the path.
    """
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_json(text), None
    if suffix in (".yaml", ".yml"):
        return _from_yaml(text), None
    if text.lstrip()[:1] in ("[", "{"):
        return _literal(text), None
    lines = [(number, line, without_quotes(line)) for number, line in lines_of(text)]
    for number, line, word in lines:
        if word != line:
            _refuse_no_word(word, f"line {number}")
        else:
            _refuse_line(line, f"line {number}", table=suffix in (".csv", ".tsv"))
    _refuse_numbers([(number, line) for number, line, _ in lines])
    if suffix in (".csv", ".tsv") and lines and lines[0][1].lower() in _HEADINGS:
        raise UserError(f"line {lines[0][0]} {short(lines[0][1])} is a heading: leave it out")
    if len(lines) == 1 and "," in lines[0][1]:
        raise UserError(
            f"its only line, {short(lines[0][1])}, has commas, which belong to a name: put each word on a line"
        )
    return [word for _, _, word in lines], [f"line {number}" for number, _, _ in lines]


def read_text(path: Path) -> str:
    """Read a file of UTF-8, or UTF-16 with its mark. Raises UserError if it can't be read or is no text."""
    try:
        # The limit counts bytes read, not the file's size, because a pipe or a device has none.
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})") from None
    except ValueError:  # a NUL in the name
        raise UserError("not a file name") from None
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"longer than {MAX_FILE_BYTES // 2**20} MiB, not a list of words")
    # PowerShell's ">" writes UTF-16.
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text") from None
    if "\0" in text:
        raise UserError("binary data, not text")
    return text


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, content) of the lines that are not empty or comments."""
    for number, line in enumerate(text.splitlines(), 1):
        content = _INVISIBLE.sub("", re.split(r"(?:^|\s)#", line, maxsplit=1)[0]).strip()
        if content:
            yield number, content


def without_quotes(line: str) -> str:
    """Return the word of a line that stands in one pair of quotation marks; other lines as they are."""
    closing = "'" if line[:1] == "'" else _QUOTES.get(line[:1])
    is_quoted = closing is not None and len(line) > 2 and line.find(closing, 1) == len(line) - 1
    return line[1:-1].strip() if is_quoted else line


def without_invisible(text: str) -> str:
    """Remove invisible characters without meaning, such as zero-width spaces and soft hyphens."""
    return text if text.isascii() else _STRAY_JOINER.sub("", _INVISIBLE.sub("", text))


def _split(line: str, used: set[str]) -> list[str]:
    """Split a line, and add its separators to `used`. A part in quotation marks may hold some, and loses the marks."""
    parts, begin, closing = [], 0, ""
    for position, character in enumerate(line):
        if closing:
            closing = "" if character == closing else closing
        elif character in _COMMAS or character in _SEMICOLONS:
            used.add(character)
            parts.append(line[begin:position].strip())
            begin = position + 1
        elif character in _QUOTES and not line[begin:position].strip():
            closing = _QUOTES[character]
    parts.append(line[begin:].strip())
    if closing:
        raise UserError(f"{short(parts[-1])} begins with a quotation mark, and none ends it")
    return [_unquoted(part, len(parts)) for part in parts]


def _unquoted(part: str, count: int) -> str:
    if part[:1] not in _QUOTES:
        return part
    closing = _QUOTES[part[0]]
    if len(part) < 2 or part.find(closing, 1) != len(part) - 1:
        raise UserError(f"{short(part)} has quotation marks inside: put all of the word in one pair, or leave them out")
    if count == 1 and any(mark in part for mark in _COMMAS + _SEMICOLONS):
        raise UserError(f"all words stand in one pair of quotation marks ({short(part)}): leave these out")
    return part[1:-1].strip()


def _refuse_no_word(text: str, source: str) -> None:
    """Raise UserError for a file name, a number or a bullet in place of a word."""
    if _FILE.search(text):
        raise UserError(
            f"{source} {short(text)} looks like a file: give it as --words-file, or in Python as a pathlib.Path"
        )
    if _NUMBERED.search(text):
        raise UserError(f"{source} {short(text)} has a number: {_NUMBERS_REMEDY}")
    if "\\" in text:
        raise UserError(f"{source} {short(text)} has a backslash: separate words by commas, or put each on a line")
    if _BULLET.match(text):
        raise UserError(f"{source} {short(text)} begins with {text[0]!r}, as lists in notes do: leave it out")


def _refuse_numbers(lines: list[tuple[int, str]]) -> None:
    """Raise UserError if every line has a number before or behind its word; "class 0, class 1" are words."""
    parts = [_BESIDE_NUMBER.fullmatch(line) for _, line in lines]
    names = {part["name"] for part in parts if part}
    every = len(parts) > 1 and any(all(part and part[end] for part in parts) for end in ("first", "last"))
    if every and len(names) == len(parts):
        raise UserError(f"every line has a number, as line {lines[0][0]} {short(lines[0][1])}: {_NUMBERS_REMEDY}")


def _refuse_line(line: str, source: str, *, table: bool) -> None:
    """Raise UserError for a line of a word file that is not one word; commas belong to the name there."""
    if "\t" in line or re.search(r"^\d+\s*,|,\s*\d+$", line) or (table and re.search(r'[,;"]', line)):
        raise UserError(f"{source} {short(line)} is of a table: give a text file with a word on each line, or JSON")
    if line[-1] == ",":
        raise UserError(f"{source} {short(line)} ends with a comma: leave it out")
    if mark := next((mark for mark in (*_SEMICOLONS, *_COMMAS[1:]) if mark in line), None):
        raise UserError(
            f'{source} {short(line)} has {mark!r}: put each word on a line of its own, or write JSON ({{"name": ...}}) '
            "if it belongs to the name"
        )
    _refuse_no_word(line, source)


def _literal(text: str) -> Any:
    """Read a JSON or Python list, or a JSON object. YAML's lists without quotation marks are refused."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        value = _python_literal(text)
    if isinstance(value, list | tuple | dict) and not _has_strings_side_by_side(text):
        return list(value) if isinstance(value, tuple) else value
    raise UserError(
        f'{short(text)} begins like a list and is none: write JSON, ["road", "car"], or the words alone with commas '
        "between"
    )


def _has_strings_side_by_side(text: str) -> bool:
    """Return whether a comma is missing between two strings of a Python literal, which would join them."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    return any(first == second == tokenize.STRING for first, second in itertools.pairwise(kinds))


def _python_literal(text: str) -> Any:
    """Evaluate a Python literal, which can't contain names or calls; None if it is not one."""
    try:
        with warnings.catch_warnings():  # about a backslash
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from None


def _from_yaml(text: str) -> Any:
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"more than {MAX_YAML_BYTES // 2**20} MiB of YAML: give a text file with a word on each line")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"not valid YAML ({' '.join(str(error).split())[:200]})") from None
    return [] if content is None else content


def listed_names(names: object) -> object:
    """Return the names of a list, or of a mapping of the numbers 0, 1, ... to names, as in YOLO's data files."""
    if not isinstance(names, Mapping):
        return names
    numbers = {str(number): name for number, name in names.items()}
    if list(numbers) != [str(number) for number in range(len(numbers))]:
        raise UserError(f"the names' numbers are not 0, 1, 2, ... in order: {short(list(numbers))}")
    return list(numbers.values())
