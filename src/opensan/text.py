"""From words to the last matrix of the model: tokens, prompt embeddings, their mean, and the caches around them.

Letters: R text rows, P prompts, L tokens, D embedding.
"""

import hashlib
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from opensan.prompt_tree import prompt_trees
from opensan.structures import TextClassifier
from opensan.text_cache import TextCache, default_folder
from opensan.tokenizer import clip_tokenizer
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rich.progress import Progress

    from opensan.model import SAN

ROWS_AT_ONCE = 256
"""Rows embedded and written to the disk cache together: what an interruption can cost."""

NODES_ON_CPU = 256
NODES_ELSEWHERE = 2_048
"""Tokens of a prompt tree: each is compared with all others, which costs a CPU more than it gains from longer trees."""

ROWS_IN_MEMORY = 65_536
"""Rows kept in memory: 128 MiB at D = 512."""

_LONGEST_TOKEN = 40
"""Characters; no token of CLIP's is longer, so text beyond this many a position needs no tokenizer to be refused."""

Value = TypeVar("Value")


def tokenize(text: str) -> list[int]:
    """CLIP's token numbers of `text`, between start and end of text; not cut, not padded."""
    tokenizer = clip_tokenizer()
    return [tokenizer.start, *tokenizer.encode(text), tokenizer.end]


def pad_tokens(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[P, L] int64: `prompts` padded with zeros to the longest of them. The tower never sees behind the end of text."""
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens


@dataclass(frozen=True)
class _Tower:
    """What is known about the text weights as they are now."""

    signature: tuple
    """Changes whenever the weights are replaced or written to."""
    fingerprint: str
    """sha256 of the weights and of what else decides about embeddings."""
    unseen: np.ndarray | None
    """[vocabulary] bool: tokens whose embedding is exactly zero; None if there is no such token."""


class TextEncoder:
    """Answers the text classifier of any vocabulary, and remembers. One object serves many threads."""

    def __init__(self, model: "SAN", *, disk_cache: bool = True, cache_dir: Path | None = None) -> None:
        """`cache_dir` is where embeddings are kept between processes (default: see `text_cache.default_folder`)."""
        self._model = model
        self._folder = (cache_dir or default_folder()) if disk_cache else None
        self._disk: TextCache | None = None
        self._tower: _Tower | None = None
        self._rows: _Recent[np.ndarray] = _Recent(ROWS_IN_MEMORY)
        self._classifiers: _Recent[TextClassifier] = _Recent(ROWS_IN_MEMORY)
        self._work = threading.Lock()

    def classifier(self, vocabulary: Vocabulary, *, progress: bool | None = None) -> TextClassifier:
        """The vocabulary as unit rows [R, D], float32, on the model's device.

        A row is the mean of its prompts' unit embeddings, normalised again (paper, section 4.1; ViLD's ensemble).
        `progress` shows a bar on stderr: None means if that is a terminal and it takes more than a second.
        Warns about words that consist of tokens the model was never trained on.
        Raises ValueError, one line naming the word, if a prompt has more tokens than the model reads.
        """
        device = self._model.clip.token_embedding.weight.device
        key = (self._signature(), device, vocabulary)
        found = self._classifiers.get(key)
        if found is None:
            with self._work:
                found = self._classifiers.get(key)
                if found is None:
                    found = self._build(vocabulary, device, progress)
                    self._classifiers.put(key, found, len(found.rows))
        return found

    def tower(self) -> tuple[str, np.ndarray | None]:
        """Fingerprint of the text weights, and which tokens were never trained ([vocabulary] bool; None: none)."""
        with self._work:
            tower = self._current_tower()
        return tower.fingerprint, tower.unseen

    def _build(self, vocabulary: Vocabulary, device: torch.device, progress: bool | None) -> TextClassifier:
        tower = self._current_tower()
        rows = vocabulary.prompts()
        names = [vocabulary.words[index].name for index in vocabulary.row_class]
        keys = [hashlib.sha256("\0".join([tower.fingerprint, *row]).encode()).digest() for row in rows]
        embeddings = self._remembered(keys)
        missing = [index for index, key in enumerate(keys) if key not in embeddings]
        missing = list({keys[index]: index for index in missing}.values())
        self._refuse_long_prompts(rows, names, missing)
        # What is made here outlives the caller's mode: it must serve training after inference, and the other way round.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            with _progress_bar(sum(len(rows[index]) for index in missing), progress) as advance:
                for start in range(0, len(missing), ROWS_AT_ONCE):
                    part = missing[start : start + ROWS_AT_ONCE]
                    found = self._embed([rows[index] for index in part], [names[index] for index in part], advance)
                    fresh = dict(zip((keys[index] for index in part), found, strict=True))
                    if self._disk:
                        self._disk.write(fresh)
                    embeddings.update(fresh)
            for key in keys:
                self._rows.put(key, embeddings[key], 1)
            self._warn_of_unseen_words(vocabulary)
            matrix = torch.from_numpy(np.stack([embeddings[key] for key in keys])).to(device)
            row_class = torch.tensor(vocabulary.row_class, device=device)
        return TextClassifier(matrix, row_class, len(vocabulary.words))

    def _remembered(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The rows that memory or disk holds."""
        found = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        if self._disk and len(found) < len(keys):
            found |= self._disk.read([key for key in keys if key not in found])
        return found

    def _embed(self, rows: list[list[str]], names: list[str], advance) -> np.ndarray:
        """[len(rows), D] float32, unit length; equal prompts go through the tower once."""
        numbers: dict[tuple[int, ...], int] = {}
        members = [
            [numbers.setdefault(tuple(self._tokens(text, name)), len(numbers)) for text in row]
            for row, name in zip(rows, names, strict=True)
        ]
        prompts = sorted(numbers)
        share = sum(map(len, rows)) / len(prompts)  # of the progress bar, which counts equal prompts too
        device = self._model.clip.token_embedding.weight.device
        found = []
        for tree in prompt_trees(prompts, NODES_ON_CPU if device.type == "cpu" else NODES_ELSEWHERE):
            found.append(self._model.embed_prompt_tree(tree.to(device)).float())
            advance(len(tree.ends) * share)
        places = torch.tensor([numbers[prompt] for prompt in prompts], device=device)
        embeddings = torch.cat(found)[places.argsort()]
        means = torch.stack([embeddings[member].mean(dim=0) for member in members])
        return F.normalize(means, dim=-1).cpu().numpy()

    def _tokens(self, text: str, name: str) -> list[int]:
        """Raises ValueError if the model can't read so many."""
        longest = self._model.config.clip.text.context_length
        if len(text) > longest * _LONGEST_TOKEN and len(" ".join(text.split())) > longest * _LONGEST_TOKEN:
            size = f"{len(text):,} characters"
        else:
            tokens = tokenize(text)
            if len(tokens) <= longest:
                return tokens
            size = f"{len(tokens)} tokens"
        raise ValueError(
            f"word {_short(name)}: the prompt {_short(text)} has {size}, and this model reads at most {longest} tokens "
            "(start and end included): shorten the word or its template"
        )

    def _refuse_long_prompts(self, rows: list[list[str]], names: list[str], missing: list[int]) -> None:
        """Find over-long prompts before any work is done. A token is a byte or more, so short prompts pass unread."""
        room = self._model.config.clip.text.context_length - 2
        for index in missing:
            for text in rows[index]:
                if len(text.encode()) > room:
                    self._tokens(text, names[index])

    def _warn_of_unseen_words(self, vocabulary: Vocabulary) -> None:
        unseen = self._current_tower().unseen
        if unseen is None:
            return
        names = []
        for word in vocabulary.words:
            texts = [*(word.prompts or word.synonyms[:1]), *word.synonyms[1:]]
            tokens = [token for text in texts for token in tokenize(text)[1:-1]]
            if unseen[tokens].all():
                names.append(word.name)
        if names:
            more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            listed = ", ".join(_short(name) for name in names[:10])
            warnings.warn(
                f"the model has never seen a word of: {listed}{more}; results for them mean nothing", stacklevel=2
            )

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.clip.named_parameters():
            if not name.startswith("visual.") and name != "logit_scale":
                yield name, parameter

    def _signature(self) -> tuple:
        return tuple(
            (parameter.data_ptr(), parameter.dtype, 0 if parameter.is_inference() else parameter._version)
            for _, parameter in self._parameters()
        )

    def _current_tower(self) -> _Tower:
        """The fingerprint of the text weights, taken anew if they changed. Called with the work lock held."""
        signature = self._signature()
        if self._tower is None or self._tower.signature != signature:
            clip = self._model.config.clip
            if clip.text.vocab_size != clip_tokenizer().size:
                raise ValueError(
                    f"the model knows {clip.text.vocab_size:,} tokens and CLIP's tokenizer {clip_tokenizer().size:,}"
                )
            digest = hashlib.sha256(f"1 {clip.embed_dim} {clip.quick_gelu} {clip.text.model_dump_json()}".encode())
            for name, parameter in sorted(self._parameters()):
                digest.update(f"\0{name} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
            unseen = (self._model.clip.token_embedding.weight.detach() == 0).all(dim=1).cpu().numpy()
            self._tower = _Tower(signature, digest.hexdigest(), unseen if unseen.any() else None)
            if self._folder:
                self._disk = TextCache(self._folder, self._tower.fingerprint, clip.embed_dim)
        return self._tower


class _Recent(Generic[Value]):
    """The most recently used values, as many as weigh no more than `limit` together."""

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


@contextmanager
def _progress_bar(total: int, wanted: bool | None) -> Iterator:
    """Yield a function that counts prompts done; a bar appears on stderr once the work has taken a second."""
    started = time.monotonic()
    bar: Progress | None = None

    def advance(count: float) -> None:
        nonlocal bar, done
        done += count
        if bar is None and (wanted or (wanted is None and sys.stderr.isatty() and time.monotonic() - started > 1)):
            bar = _new_bar(total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=round(done))

    done = 0.0
    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _new_bar(total: int) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=console.is_terminal)
    bar.add_task("embedding prompts", total=total)
    bar.start()
    return bar


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
