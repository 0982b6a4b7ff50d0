"""CLIP's tokenizer: byte-pair encoding (Sennrich et al., 2016) over bytes, with CLIP's merges.

A token is a number: 256 single bytes, the same 256 where they end a word, one for each merge in the order of the
merges, then start and end of text.
"""

import functools
import gzip
import heapq
import html
import re
import string
from itertools import pairwise
from typing import Any

from opensan.errors import UserError, install
from opensan.files import ASSETS

_MERGES = ASSETS / "tokenizer" / "merges.txt.gz"
_WORD_END = "</w>"
_LONGEST_REMEMBERED = 64
"""Characters; longer pieces are not words, and would fill the cache for words."""
_SPECIAL = ("<start_of_text>", "<end_of_text>")


def _pieces(letters: str, digits: str) -> str:
    """Return the pattern of the special tokens, English endings, words, single digits, and runs of anything else."""
    return rf"{_SPECIAL[0]}|{_SPECIAL[1]}|'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{digits}]|[^\s{letters}{digits}]+"


_ASCII_PIECES = re.compile(_pieces("a-z", "0-9"), re.IGNORECASE | re.ASCII)


@functools.cache
def _any_pieces() -> Any:
    import regex  # knows all letters; a first answer about plain words does not wait for it

    return regex.compile(_pieces(r"\p{L}", r"\p{N}"), regex.IGNORECASE)


def _byte_letters() -> dict[int, str]:
    """Return a visible letter for every byte, as in the merges: its Latin-1 letter, if it has one, else from U+0100.

    The order of the dict is that of the tokens.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Converts text to token numbers of any length; the model checks the length."""

    def __init__(self) -> None:
        self._letters = _byte_letters()
        # Texts are split and numbered as wholes, "first second" standing for a pair: a first answer waits for this.
        text = gzip.decompress(_MERGES.read_bytes()).decode().partition("\n")[2]  # the first line names their source
        merges, merged = text.splitlines(), text.replace(" ", "").splitlines()
        letters = list(self._letters.values())
        tokens = [*letters, *(letter + _WORD_END for letter in letters), *merged, *_SPECIAL]
        self._rank = dict(zip(merges, range(len(merges)), strict=True))
        self._number = dict(zip(tokens, range(len(tokens)), strict=True))
        self.size = len(tokens)
        self.start, self.end = (self._number[token] for token in _SPECIAL)
        self._remembered = functools.lru_cache(maxsize=65_536)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, repaired, HTML unescaped, lower-cased, white space collapsed, without ends."""
        text = " ".join(_repaired(text).split()).lower()
        pieces = (_ASCII_PIECES if text.isascii() else _any_pieces()).findall(text)
        return [token for piece in pieces for token in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        return self._remembered(piece) if len(piece) <= _LONGEST_REMEMBERED else self._merge(piece)

    def _merge(self, piece: str) -> tuple[int, ...]:
        """Start with bytes, and join the neighbours with the most frequent merge, until no merge is left."""
        if piece in _SPECIAL:
            return (self._number[piece],)
        parts = [self._letters[byte] for byte in piece.encode()]
        parts[-1] += _WORD_END
        count = len(parts)
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        # The pair that joining makes comes later in the merges than the pair joined, so that one place at a time, from
        # the left, gives what all places at once give.
        pairs = [f"{first} {second}" for first, second in pairwise(parts)]
        places = [(self._rank[pair], at) for at, pair in enumerate(pairs) if pair in self._rank]
        heapq.heapify(places)
        while places:
            rank, at = heapq.heappop(places)
            beside = after[at]
            if beside >= count or self._rank.get(f"{parts[at]} {parts[beside]}") != rank:
                continue  # one of the two was joined to another part
            parts[at] += parts[beside]
            parts[beside] = ""
            after[at] = after[beside]
            if after[at] < count:
                before[after[at]] = at
            for begin in (before[at], at):
                if begin >= 0 and after[begin] < count:
                    next_rank = self._rank.get(f"{parts[begin]} {parts[after[begin]]}")
                    if next_rank is not None:
                        heapq.heappush(places, (next_rank, begin))
        return tuple(self._number[part] for part in parts if part)


def _repaired(text: str) -> str:
    """Return `text` without wrong encodings, control characters and HTML entities."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nothing to repair, and importing ftfy takes longer than embedding a few words
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


class FileTokenizer:
    """The tokenizer of a tokenizer.json, run by the library `tokenizers`; its special tokens are included."""

    def __init__(self, content: bytes, *, canonical: bool) -> None:
        """Open the `content` of a tokenizer.json. `canonical`: without capitals and punctuation, as SigLIP was trained.

        Raises UserError, one line, if the content is no tokenizer, or the library is not installed.
        """
        try:
            from tokenizers import Tokenizer as Library
        except ModuleNotFoundError:
            raise UserError(f"this model's words need tokenizers: {install('encoders')}") from None
        try:
            self._library = Library.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer.json: not a tokenizer that tokenizers can read ({error})") from None
        self._library.no_padding()
        self._library.no_truncation()
        self._canonical = canonical
        self.size = self._library.get_vocab_size()

    def __call__(self, text: str) -> list[int]:
        text = " ".join(_repaired(text).split())
        if self._canonical:
            text = " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())
        return self._library.encode(text).ids


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def clip_tokenizer() -> Tokenizer:
    """Return the tokenizer that all models share."""
    return Tokenizer()
