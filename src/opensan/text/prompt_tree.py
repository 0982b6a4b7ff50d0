"""Store many prompts as one tree of tokens, in which prompts share equal beginnings.

A causal tower gives a token the same output whatever follows it. "This is a photo of a small" is therefore computed
once for all names, and so is the first half of "coffee table" and "coffee maker".
Letters: N nodes (tokens) of a tree, P prompts.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from opensan.structures import PromptTree

Prompt = tuple[int, ...]
"""Token numbers, start and end of text included."""


def prompt_trees(prompts: Sequence[Prompt], most_nodes: int) -> Iterator[PromptTree]:
    """Yield trees of up to `most_nodes` nodes (more only if one prompt has more) that hold `prompts` in order.

    Sorted prompts share the most nodes.
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
