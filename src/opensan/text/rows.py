"""Turn words into text rows, with any text tower: tokens, means, and the caches around them. Needs no torch.

Letters: R text rows, P prompts, D embedding.
"""

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from opensan.config import AnyTextConfig, SiglipTextConfig
from opensan.errors import UserError, short
from opensan.structures import Identity, PromptTree
from opensan.text.cache import TextCache, default_folder
from opensan.text.prompt_tree import prompt_trees
from opensan.text.tokenizer import FileTokenizer, clip_tokenizer
from opensan.vocabulary import Vocabulary

ROWS_AT_ONCE = 256
"""Rows embedded and written to the disk cache together; an interruption can lose so many."""

NODES_ON_CPU = 256
"""Tokens of a prompt tree: each is compared with all others, which costs a CPU more than it gains from longer trees."""

PROMPTS_AT_ONCE = 64
"""Prompts that a bidirectional tower embeds together."""

ROWS_IN_MEMORY = 65_536
"""Rows kept in memory: 128 MiB at D = 512."""

EQUAL = 1e-6
"""Rows with no larger difference in any number count as equal: batches cause differences of this size."""

_LONGEST_TOKEN = 40
"""Characters of CLIP's longest token: a text with more characters a position is refused without tokenizing it."""

Value = TypeVar("Value")


def tokenize(text: str) -> list[int]:
    """Return CLIP's token numbers of `text`, between start and end of text; not cut, not padded."""
    tokenizer = clip_tokenizer()
    return [tokenizer.start, *tokenizer.encode(text), tokenizer.end]


def padded(prompts: Sequence[Sequence[int]], length: int | None = None, padding: int = 0) -> np.ndarray:
    """Return `prompts`, each a sequence of token numbers, as [P, T] int64, filled with `padding` up to `length` tokens.

    Without a length, the longest prompt's is taken.
    """
    tokens = np.full((len(prompts), length or max(map(len, prompts))), padding, dtype=np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


@dataclass(frozen=True)
class Tower:
    """State of the text weights."""

    signature: tuple
    """Changes whenever the weights are replaced or written to."""
    identity: str
    """Identity of the weights and of all else that embeddings depend on."""
    unseen: np.ndarray | None
    """[vocabulary] bool: tokens whose embedding is exactly zero; None if there is no such token."""


def row_key(tower: str, prompts: Sequence[str]) -> bytes:
    """Return the cache key of the mean embedding of `prompts`; `tower` is the text tower's identity.

    Prompts that differ in capitals or white space alone, which reach no token, have one key.
    """
    same = (" ".join(prompt.lower().split()) for prompt in prompts)
    return hashlib.sha256("\0".join([tower, *same]).encode()).digest()


def with_equal_rows(rows: np.ndarray) -> np.ndarray:
    """Replace each of the unit rows [R, D] by the first row that is equal up to rounding.

    Words that the model never learned have equal rows, and so have texts that are the same to the tokenizer.
    """
    direction = np.cos(np.arange(rows.shape[1]) ** 2)  # any direction that no rows share; numpy.random loads slowly
    position = rows @ (direction / np.linalg.norm(direction))  # equal rows are neighbours in this order
    order = position.argsort()
    starts = np.flatnonzero(np.diff(position[order], prepend=-np.inf) > EQUAL)
    first = np.arange(len(rows))
    for start, size in zip(starts, np.diff(starts, append=len(rows)), strict=True):
        group = np.sort(order[start : start + size])
        while len(group) > 1:
            equal = np.abs(rows[group] - rows[group[0]]).max(axis=1) <= EQUAL
            first[group[equal]] = group[0]
            group = group[~equal]
    return rows[first]


class TextRows:
    """Makes the text rows of any vocabulary, with caches.

    A subclass runs the tower: `_current_tower`, and `_embed_tree` if the tower is causal, else `_embed_prompts`.
    """

    causal: bool
    """Whether the tower is causal. Only then are prompts embedded as trees: in any other tower, a token's output
    depends on later tokens."""
    tokenize: Callable[[str], list[int]] = staticmethod(tokenize)
    """The tokens of a prompt, special ones included."""
    model: Identity | None = None
    """Identity of the segmenter whose words are embedded, which tuned words must be of; None: there is no segmenter."""

    @property
    def most_nodes(self) -> int:
        """Tokens of the prompt trees that `_embed_tree` is given."""
        return NODES_ON_CPU

    def classifier(self, vocabulary: Vocabulary, *, progress: Callable[[int, int], None] | None = None) -> Any:
        """Return the vocabulary's text rows in the form that the model's image half takes, from memory if possible."""
        raise NotImplementedError

    def __init__(
        self, config: AnyTextConfig, dimension: int, *, disk_cache: bool = True, cache_dir: Path | None = None
    ) -> None:
        """`cache_dir` is where embeddings are kept between processes (default: see `text_cache.default_folder`)."""
        self._config = config
        self.causal = config.causal
        self.dimension = dimension
        """Length of a text row, D."""
        self._folder = (cache_dir or default_folder()) if disk_cache else None
        self._disk: TextCache | None = None
        self._disk_of: str | None = None
        self._rows: Recent[np.ndarray] = Recent(ROWS_IN_MEMORY)

    def _current_tower(self) -> Tower:
        raise NotImplementedError

    def _embed_tree(self, tree: PromptTree) -> np.ndarray:
        """Return the embeddings [P, D] float32, unit length, of the prompts of `tree`."""
        raise NotImplementedError

    def _embed_prompts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the embeddings [P, D] float32, unit length, of `tokens` [P, T] int64, padded as the tower wants."""
        raise NotImplementedError

    def padded(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return `prompts`, each a sequence of token numbers, as [P, T] int64, padded as the tower wants."""
        if self._config.padding is None:
            return padded(prompts)
        return padded(prompts, self._config.context_length, self._config.padding)

    def _open_tokenizer(self, content: bytes) -> None:
        """Read words by the tokenizer.json of this `content`."""
        self.tokenize = FileTokenizer(content, canonical=isinstance(self._config, SiglipTextConfig))

    def rows(self, vocabulary: Vocabulary, *, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Return the vocabulary as unit rows [R, D], float32; one thread at a time.

        A row is the mean of its prompts' unit embeddings, normalised again (paper, section 4.1; ViLD's ensemble).
        Rows that are equal up to rounding are equal in every bit. Tuned words have the vectors that were found for them
        (`Vocabulary.tuned`), which need no text tower.
        `progress` is called with the number of prompts that are embedded, and of all that must be.
        Warns about words that consist of tokens the model was never trained on.
        Raises ValueError, one line naming the word, if a prompt has more tokens than the model reads, or if the words
        were tuned for another model.
        """
        tuned = self._tuned(vocabulary)
        tower = self._current_tower()
        if self._folder and self._disk_of != tower.identity:
            self._disk = TextCache(self._folder, tower.identity, self.dimension)
            self._disk_of = tower.identity
        rows = vocabulary.prompts()
        names = [vocabulary.words[index].name for index in vocabulary.row_class]
        keys = [row_key(tower.identity, row) for row in rows]
        plain = [index for index in range(len(rows)) if index not in tuned]
        embeddings = self._remembered([keys[index] for index in plain])
        missing = [index for index in plain if keys[index] not in embeddings]
        missing = list({keys[index]: index for index in missing}.values())
        self._refuse_long_prompts(rows, names, missing)
        total, done = sum(len(rows[index]) for index in missing), 0.0

        def advance(count: float) -> None:
            nonlocal done
            done += count
            if progress:
                progress(round(done), total)

        for start in range(0, len(missing), ROWS_AT_ONCE):
            part = missing[start : start + ROWS_AT_ONCE]
            new = self._embed([rows[index] for index in part], [names[index] for index in part], advance)
            fresh = dict(zip((keys[index] for index in part), new, strict=True))
            if self._disk:
                self._disk.write(fresh)
            embeddings.update(fresh)
        for index in plain:
            self._rows.put(keys[index], embeddings[keys[index]], 1)
        self._warn_of_unseen_words(vocabulary)
        if vocabulary.tuned is not None and vocabulary.tuned.context is not None:
            offset = self._read_vector(vocabulary.tuned.context, "the context")
            embeddings = {key: _unit(row + offset) for key, row in embeddings.items()}
        return with_equal_rows(np.stack([tuned[i] if i in tuned else embeddings[key] for i, key in enumerate(keys)]))

    def _tuned(self, vocabulary: Vocabulary) -> dict[int, np.ndarray]:
        """Return the rows that were tuned, [D] unit length. Raises UserError if that was for another model."""
        words = vocabulary.tuned
        if words is None:
            return {}
        if self.model is None or not self.model.is_of(words.image, words.text):
            here = "another one" if self.model is None else str(self.model)
            raise UserError(
                f"these words were tuned for the model {words.model} (image half {words.image[:12]}, text half "
                f"{words.text[:12]}), and this is {here}: use them with that model, or tune words for this one"
            )
        texts = [text for word in vocabulary.words for text in word.synonyms]
        return {
            row: _unit(self._read_vector(vector, short(texts[row]))) for row, vector in vocabulary.tuned_rows.items()
        }

    def _read_vector(self, vector: bytes, of: str) -> np.ndarray:
        numbers = np.frombuffer(vector, dtype="<f2").astype(np.float32)
        if numbers.shape != (self.dimension,) or not np.isfinite(numbers).all():
            raise UserError(
                f'"tuned": the vector of {of} has {len(numbers)} numbers, or some that are not finite; this model '
                f"has vectors of {self.dimension}"
            )
        return numbers

    def _remembered(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the rows that memory or disk holds."""
        rows = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        if self._disk and len(rows) < len(keys):
            rows |= self._disk.read([key for key in keys if key not in rows])
        return rows

    def _embed(self, rows: list[list[str]], names: list[str], advance: Callable[[float], None]) -> np.ndarray:
        """Return [len(rows), D] float32, unit length; equal prompts go through the tower once."""
        numbers: dict[tuple[int, ...], int] = {}
        members = [
            [numbers.setdefault(tuple(self._tokens(text, name)), len(numbers)) for text in row]
            for row, name in zip(rows, names, strict=True)
        ]
        prompts = sorted(numbers)
        share = sum(map(len, rows)) / len(prompts)  # `advance` counts equal prompts too
        parts = []
        if self.causal:
            for tree in prompt_trees(prompts, self.most_nodes):
                parts.append(self._embed_tree(tree))
                advance(len(tree.ends) * share)
        else:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                batch = prompts[start : start + PROMPTS_AT_ONCE]
                parts.append(self._embed_prompts(self.padded(batch)))
                advance(len(batch) * share)
        places = np.array([numbers[prompt] for prompt in prompts])
        embeddings = np.concatenate(parts)[places.argsort()]
        means = np.stack([embeddings[member].mean(axis=0) for member in members])
        return _unit(means)

    def _tokens(self, text: str, name: str) -> list[int]:
        """Return the tokens of a prompt. Raises UserError if the model can't read so many."""
        longest = self._config.context_length
        if len(text) > longest * _LONGEST_TOKEN and len(" ".join(text.split())) > longest * _LONGEST_TOKEN:
            size = f"{len(text):,} characters"
        else:
            tokens = self.tokenize(text)
            if len(tokens) <= longest:
                return tokens
            size = f"{len(tokens)} tokens"
        raise UserError(
            f"word {short(name)}: the prompt {short(text)} has {size}, and this model reads at most {longest} tokens "
            "(start and end included): shorten the word or its template"
        )

    def _refuse_long_prompts(self, rows: list[list[str]], names: list[str], missing: list[int]) -> None:
        """Refuse prompts that are too long before any work. A token is a byte or more, so short ones are skipped."""
        room = self._config.context_length - 2
        for index in missing:
            for text in rows[index]:
                if len(text.encode()) > room:
                    self._tokens(text, names[index])

    def unseen_texts(self, vocabulary: Vocabulary) -> list[str]:
        """Return the words, by name, and the synonyms that consist of tokens the model was never trained on."""
        unseen = self._current_tower().unseen
        names: list[str] = []
        if unseen is None:
            return names
        first = 0
        for word in vocabulary.words:
            row, first = first, first + len(word.synonyms)
            if any(index in vocabulary.tuned_rows for index in range(row, first)):
                continue  # it means what the images showed
            texts = {
                word.synonyms[0]: word.prompts or word.synonyms[:1],
                **{text: (text,) for text in word.synonyms[1:]},
            }
            never = [
                name
                for name, read in texts.items()
                if unseen[[t for text in read for t in self.tokenize(text)[1:-1]]].all()
            ]
            names += [word.name] if len(never) == len(texts) else never
        return names

    def _warn_of_unseen_words(self, vocabulary: Vocabulary) -> None:
        names = self.unseen_texts(vocabulary)
        if names:
            more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            listed = ", ".join(short(name) for name in names[:10])
            warnings.warn(
                f"the model has never seen a word of: {listed}{more}; results for them mean nothing", stacklevel=2
            )


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return vectors [..., D] at unit length."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


class Recent(Generic[Value]):
    """Cache of the most recently used values, with a total weight of at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._total = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, weight: int) -> None:
        with self._lock:
            self._total += weight - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, weight)
            while self._total > self._limit and len(self._values) > 1:
                self._total -= self._values.popitem(last=False)[1][1]
