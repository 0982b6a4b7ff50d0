"""Prompts that begin alike share their beginning: many sentences as one tree of tokens.

A causal tower gives a token the same output whatever follows it. "This is a photo of a small" is therefore computed
once for all names, and so is the first half of "coffee table" and "coffee maker".
Letters: N nodes (tokens) of a tree, P prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Prompt = tuple[int, ...]
"""Token numbers, start and end of text included."""


@dataclass(frozen=True)
class PromptTree:
    """Prompts as a tree; a node stands behind its parent. Made as arrays; a model reads tensors (`to`)."""

    tokens: "np.ndarray | Tensor"
    """[N] int64."""
    depth: "np.ndarray | Tensor"
    """[N] int64: the token's position in its prompts."""
    sees: "np.ndarray | Tensor"
    """[N, N] bool: row i is true at i and at its ancestors, which is all that a causal tower lets it see."""
    ends: "np.ndarray | Tensor"
    """[P] int64: the node of each prompt's last token."""

    def to(self, device: "torch.device | str") -> "PromptTree":
        """The same as tensors on `device`."""
        import torch  # a tree is made where torch need not be installed

        parts = (self.tokens, self.depth, self.sees, self.ends)
        return PromptTree(*(torch.as_tensor(part, device=device) for part in parts))


def prompt_trees(prompts: Sequence[Prompt], most_nodes: int) -> Iterator[PromptTree]:
    """Trees of up to `most_nodes` nodes (more only where one prompt has more) that hold `prompts` in their order.

    Sorted prompts share most.
    """
    nodes: dict[Prompt, int] = {}  # by the tokens from the start of text to the node
    ends: list[int] = []
    for prompt in prompts:
        starts = [prompt[:length] for length in range(1, len(prompt) + 1)]
        if ends and len(nodes) + sum(start not in nodes for start in starts) > most_nodes:
            yield _tree(nodes, ends)
            nodes, ends = {}, []
        for start in starts:
            nodes.setdefault(start, len(nodes))
        ends.append(nodes[prompt])
    if ends:
        yield _tree(nodes, ends)


def _tree(nodes: dict[Prompt, int], ends: Sequence[int]) -> PromptTree:
    sees = np.eye(len(nodes), dtype=bool)
    for start, node in nodes.items():
        if len(start) > 1:
            sees[node] |= sees[nodes[start[:-1]]]
    return PromptTree(
        tokens=np.array([start[-1] for start in nodes], dtype=np.int64),
        depth=np.array([len(start) - 1 for start in nodes], dtype=np.int64),
        sees=sees,
        ends=np.array(ends, dtype=np.int64),
    )
