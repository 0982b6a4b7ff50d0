"""CLIP's text tower: a transformer over tokens, read at the end-of-text token.

Letters: P prompts, T tokens, N nodes of a prompt tree, D embedding.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import TextConfig
from opensan.model.transformer import ClipBlock, ClipBlocks
from opensan.structures import PromptTree


class TextTower(nn.Module):
    """A text tower with open_clip's parameter names; causal as CLIP's, or bidirectional."""

    def __init__(self, config: TextConfig, embed_dim: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.causal_text = config.causal
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = ClipBlocks(config.width, config.layers, config.heads, 4.0, activation)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._initialise_text(config)

    def _initialise_text(self, config: TextConfig) -> None:
        """Initialize as CLIP does (Radford et al., 2021): deviations by width, and by depth for residual outputs."""
        within = config.width**-0.5
        residual = within * (2 * config.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, ClipBlock)
            first, _, last = block.mlp
            nn.init.normal_(block.attn.in_proj_weight, std=within)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(cast(nn.Linear, first).weight, std=(2 * config.width) ** -0.5)
            nn.init.normal_(cast(nn.Linear, last).weight, std=residual)
        nn.init.normal_(self.text_projection, std=within)

    def token_table(self) -> Tensor:
        """Return the embedding of every token, [V, C]."""
        return self.token_embedding.weight

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Embed `tokens` [P, T] int64, T up to the context length, as unit rows [P, D].

        A prompt is read at its end-of-text token (the largest id) and never sees what stands behind it, so cutting
        `tokens` after the longest prompt of the batch changes nothing.
        """
        length = tokens.shape[1]
        position = torch.arange(length, device=tokens.device)
        ends = tokens.argmax(dim=-1)
        if self.causal_text:
            hidden = position > position.unsqueeze(1)  # [T, T]
        else:
            hidden = (position > ends.unsqueeze(1)).view(-1, 1, 1, length)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(hidden, -torch.inf)
        for block in self.transformer.resblocks:
            x = block(x, attn_mask=mask)
        x = self.ln_final(x[torch.arange(x.shape[0], device=x.device), ends])
        return F.normalize(x @ self.text_projection, dim=-1)

    def embed_prompt_tree(self, tree: PromptTree) -> Tensor:
        """Embed the prompts of `tree` as unit rows [P, D], as `embed_prompts` would. Causal towers only."""
        assert self.causal_text, "a token of a bidirectional tower depends on what follows it"
        x = (self.token_embedding(tree.tokens) + self.positional_embedding[tree.depth]).unsqueeze(0)
        mask = torch.zeros(tree.sees.shape, dtype=x.dtype, device=x.device).masked_fill_(
            ~torch.as_tensor(tree.sees), -torch.inf
        )
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask=mask)
        # Only the ends are read.
        x = self.ln_final(last(x[:, tree.ends], attn_mask=mask[tree.ends], context=x).squeeze(0))
        return F.normalize(x @ self.text_projection, dim=-1)
