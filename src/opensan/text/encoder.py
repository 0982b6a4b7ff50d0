"""Embed words with torch, for the last matrix of the model; see `opensan.text.rows` for the caches around it.

Letters: R text rows, P prompts, L tokens, D embedding.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from opensan.assemble.bands import first_equal
from opensan.config import TOKENIZER_NAME
from opensan.errors import UserError
from opensan.model.identity import text_identity
from opensan.model.mapped import forgetting, keep
from opensan.model.transformer import Block
from opensan.structures import PromptTree, TextClassifier
from opensan.text.rows import NODES_ON_CPU, ROWS_IN_MEMORY, Recent, TextRows, Tower, padded, tokenize
from opensan.text.tokenizer import FileTokenizer, clip_tokenizer
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.model import SAN

__all__ = ["TextEncoder", "pad_tokens", "tokenize"]

NODES_ELSEWHERE = 2_048
"""Tokens of a prompt tree on an accelerator; see `NODES_ON_CPU`."""


TOKENS_AT_ONCE = 4_096
"""Rows of the token table that are looked at together."""


def pad_tokens(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return [P, L] int64: `prompts` padded with zeros to the longest. The tower ignores all after the end of text."""
    return torch.from_numpy(padded(prompts))


class TextEncoder(TextRows):
    """Makes the text classifier of any vocabulary, with a cache. Many threads may share one object."""

    def __init__(
        self,
        model: "SAN",
        *,
        disk_cache: bool = True,
        cache_dir: Path | None = None,
        identity: str | None = None,
        sole: bool = False,
    ) -> None:
        """`cache_dir` is the folder of the disk cache (default: see `opensan.text.cache.default_folder`).

        `identity` of the text tower, where it is known already. `sole`: nobody else uses the model, so
        weights of a file leave memory after each use.
        """
        clip = model.config.clip
        super().__init__(clip.text, clip.embed_dim, disk_cache=disk_cache, cache_dir=cache_dir)
        self._model = model
        self._tower: Tower | None = None
        self._classifiers: Recent[TextClassifier] = Recent(ROWS_IN_MEMORY)
        self._known = (self._signature(), identity)
        self._sole = sole
        self._work = threading.Lock()

    def classifier(
        self, vocabulary: Vocabulary, *, progress: Callable[[int, int], None] | None = None
    ) -> TextClassifier:
        """Return the vocabulary as unit rows [R, D], float32, on the model's device.

        A row is the mean of its prompts' unit embeddings, normalised again (paper, section 4.1; ViLD's ensemble).
        `progress` is called with the number of prompts that are embedded, and of all that must be.
        Warns about words that consist of tokens the model was never trained on.
        Raises ValueError, one line naming the word, if a prompt has more tokens than the model reads.
        """
        device = self._device
        key = (self._signature(), device, vocabulary)
        classifier = self._classifiers.get(key)
        if classifier is None:
            with self._work:
                classifier = self._classifiers.get(key)
                if classifier is None:
                    classifier = self._build(vocabulary, device, progress)
                    self._classifiers.put(key, classifier, len(classifier.rows))
        return classifier

    def tower(self) -> tuple[str, np.ndarray | None]:
        """Identity of the text weights, and which tokens were never trained ([vocabulary] bool; None: none)."""
        with self._work:
            tower = self._current_tower()
        return tower.identity, tower.unseen

    def _build(
        self, vocabulary: Vocabulary, device: torch.device, progress: Callable[[int, int], None] | None
    ) -> TextClassifier:
        # The rows outlive the caller's mode: they must serve training after inference, and inference after training.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            with self._leaving_memory():
                rows = self.rows(vocabulary, progress=progress)
            first = first_equal(rows)
            all_differ = np.array_equal(first, np.arange(len(rows)))
            return TextClassifier(
                torch.from_numpy(rows).to(device),
                torch.tensor(vocabulary.row_class, device=device),
                len(vocabulary.words),
                None if all_differ else torch.from_numpy(first).to(device),
            )

    @contextmanager
    def _leaving_memory(self) -> Iterator[None]:
        """Have each of the tower's blocks leave memory when it was computed, and the rest of the tower at the end."""
        if not self._sole:
            yield
            return
        forget = forgetting()

        def forget_block(block: nn.Module, *_: object) -> None:
            for parameter in block.parameters():
                forget(parameter.data)

        clip = self._model.clip
        hooks = [
            module.register_forward_hook(forget_block)
            for name, module in clip.named_modules()
            if isinstance(module, Block) and clip.is_text(f"{name}.weight")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for _, parameter in self._parameters():
                forget(parameter.data)

    @property
    def most_nodes(self) -> int:
        """Tokens of a prompt tree on the model's present device."""
        return NODES_ON_CPU if self._device.type == "cpu" else NODES_ELSEWHERE

    @property
    def _device(self) -> torch.device:
        return self._model.clip.logit_scale.device

    def _embed_tree(self, tree: PromptTree) -> np.ndarray:
        return self._model.embed_prompt_tree(tree.to(self._device)).float().cpu().numpy()

    def _embed_prompts(self, tokens: np.ndarray) -> np.ndarray:
        return self._model.embed_prompts(torch.from_numpy(tokens).to(self._device)).float().cpu().numpy()

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.clip.named_parameters():
            if self._model.clip.is_text(name):
                yield name, parameter

    def _signature(self) -> tuple:
        return tuple(
            (parameter.data_ptr(), parameter.dtype, 0 if parameter.is_inference() else parameter._version)
            for _, parameter in self._parameters()
        )

    def _unseen(self) -> np.ndarray:
        """Return which tokens' rows hold zeros alone, [vocabulary] bool."""
        forget = forgetting() if self._sole else keep
        parts = []
        for rows in self._model.clip.token_table().detach().split(TOKENS_AT_ONCE):
            parts.append((rows == 0).all(dim=1).cpu().numpy())
            forget(rows)
        return np.concatenate(parts)

    def _tokens_known(self) -> int:
        """Count the tokens that the tokenizer knows, after opening that of a model that has its own."""
        text = self._model.config.clip.text
        if not text.own_tokenizer:
            return clip_tokenizer().size
        if not isinstance(self.tokenize, FileTokenizer):
            if self._model.tokenizer is None:
                raise UserError(f"{self._model.config.name} has no {TOKENIZER_NAME}: its words can't be read")
            self._open_tokenizer(self._model.tokenizer)
        assert isinstance(self.tokenize, FileTokenizer)
        return self.tokenize.size

    def _current_tower(self) -> Tower:
        """Return the identity of the text weights, computed again if they changed. Called with the work lock held."""
        signature = self._signature()
        if self._tower is None or self._tower.signature != signature:
            clip = self._model.config.clip
            known = self._tokens_known()
            if clip.text.vocab_size < known or (clip.text.vocab_size > known and not clip.text.own_tokenizer):
                raise UserError(f"the model knows {clip.text.vocab_size:,} tokens and its tokenizer {known:,}")
            identity = self._known[1] if self._known[0] == signature else None
            identity = identity or text_identity(self._model)
            narrow = {str(parameter.dtype) for _, parameter in self._parameters()} - {"torch.float32"}
            if narrow:  # equal numbers, computed with otherwise
                identity = hashlib.sha256(f"{identity} {sorted(narrow)}".encode()).hexdigest()
            unseen = self._unseen()
            self._tower = Tower(signature, identity, unseen if unseen.any() else None)
        return self._tower
