"""Data types that several packages share.

Letters: B batch, Q queries, K words (classes), R text rows, D embedding, h w stride-16 grid, N CLIP attention heads;
of a prompt tree, N nodes (tokens), P prompts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Identity of a model, to the last number, by which stored results are compared.

    Encodings depend on the image half alone, embedded words on the text half alone, labels on both.
    """

    name: str
    """Name in the model's configuration; for people."""
    image: str
    """Hash of all but the text tower, and of its configuration; of an exported model, with its format and precision."""
    text: str
    """Hash of the text tower, and of its configuration."""

    @property
    def encodings(self) -> str:
        """Identity in encodings: the name, and 12 digits for the image half."""
        return f"{self.name}-{self.image[:12]}"

    @property
    def source(self) -> Identity:
        """Identity of the model that this one was exported from; itself, if it was not exported."""
        # An exported model's hashes are its source's with the format behind them.
        return Identity(self.name, self.image[:64], self.text[:64])

    def is_of(self, image: str, text: str) -> bool:
        """Return whether a model with these hashes has the same weights: this one, or the one it was exported from."""
        return (self.source.image, self.source.text) == (image[:64], text[:64])

    def __str__(self) -> str:
        """Return the name, and 12 digits for both halves."""
        return f"{self.name}-{hashlib.sha256(f'{self.image} {self.text}'.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of an image in the steps of its processing, each (height, width) in pixels."""

    image: tuple[int, int]
    """Size as decoded; label maps have this size."""
    network: tuple[int, int]
    """Size after the short-side resize."""
    padded: tuple[int, int]
    """Size after zero-padding at the bottom and right."""


@dataclass(frozen=True)
class Proposals:
    """Mask proposals: the results of the image half, which do not depend on words."""

    mask_logits: Tensor
    """[B, Q, h, w] float; sigmoid gives each proposal's mask at stride 16 of the padded image."""
    mask_embeddings: Tensor
    """[B, Q, D] float, unit length, in CLIP's joint space."""
    attention_bias: Tensor | None = None
    """[B, N, Q, h, w] float, after the scalar affine, before the max-pool to CLIP's grid; not kept in encodings."""
    auxiliary: tuple[Proposals, ...] = ()
    """Deep supervision (training only): the proposals of earlier side blocks, first block first."""


@dataclass(frozen=True)
class TextClassifier:
    """A vocabulary as text rows: the last matrix of the model."""

    rows: Tensor
    """[R, D] float, unit length: one row a synonym."""
    row_class: Tensor
    """[R] int64, ascending: the class (0..K-1) of each row."""
    num_classes: int
    """K."""
    first_equal: Tensor | None = None
    """[R] int64: the first row that equals each row; None if no two rows are equal."""


@dataclass(frozen=True)
class PromptTree:
    """Prompts as a tree; a node comes after its parent. Made as arrays; models need tensors (`to`)."""

    tokens: np.ndarray | Tensor
    """[N] int64."""
    depth: np.ndarray | Tensor
    """[N] int64: the token's position in its prompts."""
    sees: np.ndarray | Tensor
    """[N, N] bool: row i is true at i and at its ancestors, to which a causal tower lets it attend."""
    ends: np.ndarray | Tensor
    """[P] int64: the node of each prompt's last token."""

    def to(self, device: torch.device | str) -> PromptTree:
        """Return the tree as tensors on `device`."""
        import torch  # here, because trees are also made where torch is not installed

        parts = (self.tokens, self.depth, self.sees, self.ends)
        return PromptTree(*(torch.as_tensor(part, device=device) for part in parts))
