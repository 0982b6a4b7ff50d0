"""Embed words without torch: by the exported text tower, and with the words embedded at export.

Letters: R text rows, D embedding.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan.config import AnyClipConfig
from opensan.errors import UserError
from opensan.segmenters.exported.manifest import ExportManifest
from opensan.segmenters.exported.runtimes import Run
from opensan.structures import PromptTree
from opensan.text.rows import ROWS_IN_MEMORY, Recent, TextRows, Tower, row_key
from opensan.vocabulary import Vocabulary

WORDS_NAME = "words.safetensors"

_MOST_NAMED = 10


@dataclass(frozen=True)
class EmbeddedWords:
    """Text rows that need no text tower."""

    rows: Mapping[bytes, np.ndarray] = field(default_factory=dict)
    """`opensan.text.rows.row_key` -> [D] float32, unit length."""
    names: tuple[str, ...] = ()
    """Words or synonyms of the rows, in the same order."""

    @classmethod
    def of(cls, vocabulary: Vocabulary, rows: np.ndarray, tower: str) -> "EmbeddedWords":
        """Make it of the `rows` [R, D] of a vocabulary, under the identity `tower` of their text tower."""
        keys = [row_key(tower, prompts) for prompts in vocabulary.prompts()]
        names = [synonym for word in vocabulary.words for synonym in word.synonyms]
        return cls(dict(zip(keys, rows, strict=True)), tuple(dict(zip(keys, names, strict=True)).values()))

    def save(self, path: Path) -> None:
        """Write a safetensors file: "rows" [R, D], "keys" [R, 32] uint8, and the names in its metadata."""
        keys = np.frombuffer(b"".join(self.rows), dtype=np.uint8).reshape(len(self.rows), -1)
        tensors = {"keys": keys, "rows": np.stack(list(self.rows.values()))}
        save_file(tensors, path, metadata={"words": json.dumps(self.names)})

    @classmethod
    def load(cls, path: Path, dimension: int) -> "EmbeddedWords":
        """Read a file that `save` wrote; empty if it does not exist. Raises UserError, one line, on any other file."""
        if not path.exists():
            return cls()
        try:
            with safe_open(path, framework="np") as file:
                names = tuple(map(str, json.loads(file.metadata()["words"])))
                keys, rows = file.get_tensor("keys"), file.get_tensor("rows")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not embedded words ({error})") from None
        if not (
            rows.shape == (len(names), dimension)
            and rows.dtype == np.float32
            and keys.dtype == np.uint8
            and keys.shape == (len(names), 32)
            and np.isfinite(rows).all()
        ):
            raise UserError(f"{path}: not embedded words of this model (it has others, or is damaged)")
        return cls({key.tobytes(): row for key, row in zip(keys, rows, strict=True)}, names)


class ExportedText(TextRows):
    """The text half of an exported model, with the words embedded at export."""

    def __init__(
        self,
        graph: Run | None,
        embedded: EmbeddedWords,
        manifest: ExportManifest,
        clip: AnyClipConfig,
        *,
        disk_cache: bool,
        tokenizer: bytes | None = None,
    ) -> None:
        """`tokenizer` is the content of tokenizer.json, if the text tower reads other tokens than CLIP's."""
        super().__init__(clip.text, clip.embed_dim, disk_cache=disk_cache)
        if tokenizer is not None:
            self._open_tokenizer(tokenizer)
        self._graph = graph
        self._embedded = embedded
        self._manifest = manifest
        self._tower: Tower | None = None
        self._found: Recent[np.ndarray] = Recent(ROWS_IN_MEMORY)
        self._work = threading.Lock()

    def classifier(self, vocabulary: Vocabulary, *, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Return `TextRows.rows`, from memory if possible; threads may call it together."""
        with self._work:
            rows = self._found.get(vocabulary)
            if rows is None:
                rows = self.rows(vocabulary, progress=progress)
                self._found.put(vocabulary, rows, len(rows))
        return rows

    def _current_tower(self) -> Tower:
        if self._tower is None:
            unseen = None
            if self._manifest.seen_tokens is not None:
                unseen = np.ones(self._config.vocab_size, dtype=bool)
                unseen[list(self._manifest.seen_tokens)] = False
            self._tower = Tower((), self._manifest.text_tower, unseen)
        return self._tower

    def _remembered(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        rows = {key: self._embedded.rows[key] for key in keys if key in self._embedded.rows}
        return rows | super()._remembered([key for key in keys if key not in rows])

    def _embed(self, rows: list[list[str]], names: list[str], advance: Callable[[float], None]) -> np.ndarray:
        if self._graph is None:
            raise UserError(self._unknown(names[0]))
        return super()._embed(rows, names, advance)

    def _embed_tree(self, tree: PromptTree) -> np.ndarray:
        assert self._graph is not None  # see `_embed`
        (embeddings,) = self._graph(tokens=tree.tokens, depth=tree.depth, sees=tree.sees, ends=tree.ends)
        return embeddings

    def _embed_prompts(self, tokens: np.ndarray) -> np.ndarray:
        assert self._graph is not None  # see `_embed`
        (embeddings,) = self._graph(tokens=tokens)
        return embeddings

    def _unknown(self, name: str) -> str:
        known = self._embedded.names
        if not known:
            return f"word {name!r}: this model was exported without text tower and words; export it with either"
        more = f" and {len(known) - _MOST_NAMED:,} more" if len(known) > _MOST_NAMED else ""
        return (
            f"word {name!r}: this model was exported without its text tower, and knows only "
            f"{', '.join(known[:_MOST_NAMED])}{more}, with the templates of that time"
        )
