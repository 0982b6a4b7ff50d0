"""MaskCLIP with mask class tokens (Ding et al., ICML 2023): a class token for each mask runs through all of CLIP.

A token sees the class token and the patches in its mask; nobody sees it, not even itself. The proposals are those of
the model that is given. Letters: B batch, Q queries, K words, N heads, L patches, C channels, D embedding, h w
stride-16 grid.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opensan.errors import UserError
from opensan.model import SAN
from opensan.model.maps import adaptive_max_pool
from opensan.segmenters.baselines.counting import Stage
from opensan.segmenters.baselines.dense import baseline_identity
from opensan.segmenters.baselines.options import MaskTokenOptions
from opensan.segmenters.results import Encoding, InputImage
from opensan.segmenters.san import SanSegmenter, undisturbed
from opensan.structures import Proposals, TextClassifier
from opensan.vocabulary import Vocabulary


class RelativeMaskAttention(nn.Module):
    """Adds to the attention logits of mask tokens, in some blocks, what the mask itself says about each patch.

    The mask's tanh goes through a convolution of CLIP's patch size and a LayerNorm; its product with a linear map of
    the patch, summed over a head's channels, is added to that head's logit. The refinement of masks by the same
    features is left out. A new one changes nothing: the linear map begins at zero.
    """

    def __init__(self, width: int, heads: int, patch_size: int, blocks: Sequence[int]) -> None:
        """`blocks`: numbers of CLIP's blocks, from 1 (5, 11, 17 and 23 of 24 in the paper)."""
        super().__init__()
        self.heads = heads
        self.embedding = nn.Conv2d(1, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width)
        self.maps = nn.ModuleDict({str(block): nn.Linear(width, width) for block in blocks})
        for parameter in self.maps.parameters():
            nn.init.zeros_(parameter)

    def embed_masks(self, mask_logits: Tensor) -> Tensor:
        """Embed masks at the CLIP image's size, [B, Q, H, W], patch by patch: [B, Q, L, C]."""
        maps = self.embedding(mask_logits.tanh().flatten(0, 1).unsqueeze(1))
        return self.norm(maps.flatten(2).transpose(1, 2)).unflatten(0, mask_logits.shape[:2])

    def forward(self, block: int, patches: Tensor, masks: Tensor) -> Tensor | None:
        """Return what is added to the logits in a block, [B, N, Q, L]; None in the other blocks.

        `patches` [B, L, C] at the block's input, `masks` [B, Q, L, C] from `embed_masks`.
        """
        if str(block) not in self.maps:
            return None
        mapped = self.maps[str(block)](patches).unflatten(2, (self.heads, -1))
        return torch.einsum("blnd,bqlnd->bnql", mapped, masks.unflatten(3, (self.heads, -1)))


class MaskTokenSegmenter(SanSegmenter):
    """Labels by mask class tokens. The tokens' outputs take the place of the proposals' "mask_embeddings"."""

    has_no_object = False

    def __init__(self, model: SAN, options: MaskTokenOptions, **settings: Any) -> None:
        """Use `opensan.load("mask-tokens:MODEL")` to make one. Raises UserError if the backbone is no plain ViT."""
        check_plain_vit(model)
        super().__init__(model, **settings)
        self.options = options
        self.relative = None if options.relative is None else load_relative(model, options.relative).to(self.device)
        self.identity = baseline_identity(self.identity, "mask-tokens", _with_content(options))
        self.text.model = self.identity

    @undisturbed
    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Propose masks on images of one padded shape, and run a token for each through CLIP."""
        encodings = super().encode_prepared(batch)
        pixels = torch.stack([torch.as_tensor(image.prepared.pixels) for image in batch]).to(self.device)
        masks = torch.stack([self._masks(encoding) for encoding in encodings])
        embeddings = embed_masks(self.model, pixels, masks, self.options, self.relative)
        return [
            replace(encoding, arrays={**encoding.arrays, "mask_embeddings": own.clone()})
            for encoding, own in zip(encodings, embeddings.float(), strict=True)
        ]

    @undisturbed
    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> Tensor:
        """Return the softmax over the words alone, [Q, K]: the method has no "no object"."""
        embeddings = torch.as_tensor(encoding["mask_embeddings"], device=self.device)
        proposals = Proposals(self._masks(encoding).unsqueeze(0), embeddings.unsqueeze(0))
        return self.model.classify(proposals, self.text.classifier(vocabulary))[0, :, :-1].softmax(dim=1)

    def class_logits(self, embeddings: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | None:
        """Return the words' logits, and minus infinity for "no object"; see `ProposalSegmenter.class_logits`."""
        logits = super().class_logits(embeddings, vocabulary)
        assert logits is not None
        logits[:, -1] = -np.inf
        return logits


def check_plain_vit(model: SAN) -> None:
    """Raise UserError, one line, unless the model's backbone is a plain ViT with a class token."""
    kind = model.config.clip.kind
    if kind != "clip_vit":
        raise UserError(
            f"mask-tokens: the method adds class tokens to a plain ViT (clip_vit), and {model.config.name} has {kind}"
        )


def _with_content(options: MaskTokenOptions) -> MaskTokenOptions:
    """Return options that name the content of the file with weights, not its place."""
    if options.relative is None:
        return options
    return options.model_copy(update={"relative": hashlib.sha256(Path(options.relative).read_bytes()).hexdigest()})


def load_relative(model: SAN, path: str) -> RelativeMaskAttention:
    """Read the weights of relative mask attention; the blocks are those whose maps the file holds.

    Raises UserError, one line, if the file can't be read or does not fit the model's CLIP.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"mask-tokens: relative={path}: not a readable safetensors file ({error})") from None
    vision: Any = getattr(model.config.clip, "vision", None)
    blocks = sorted({int(name.split(".")[1]) for name in state if name.startswith("maps.")})
    relative = RelativeMaskAttention(vision.width, vision.heads, vision.patch_size, blocks)
    try:
        relative.load_state_dict(state)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise UserError(f"mask-tokens: relative={path}: does not fit this CLIP ({told[:200]})") from None
    return relative.eval()


def embed_masks(
    model: SAN,
    pixels: Tensor,
    mask_logits: Tensor,
    options: MaskTokenOptions,
    relative: RelativeMaskAttention | None = None,
) -> Tensor:
    """Run a class token for each mask through all blocks of CLIP: unit embeddings [B, Q, D].

    `pixels` [B, 3, H, W], padded and normalised; `mask_logits` [B, Q, h, w]. Patches and class token go through CLIP
    as if there were no mask tokens.
    """
    clip: Any = model.clip
    scale = model.config.clip_scale if options.scale is None else options.scale
    small = F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False)
    features = clip.shallow_features(small, 0, ())
    x = features.tokens
    tokens = x[:, :1].expand(-1, mask_logits.shape[1], -1)
    inside = adaptive_max_pool((mask_logits >= 0).float(), features.grid).flatten(2) > 0  # sigmoid(mask) >= 0.5
    # The class token is seen by all: [B, 1, Q, 1 + L].
    hidden = F.pad(~inside, (1, 0)).unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)
    masks = None
    if relative is not None:
        whole = [side * relative.embedding.kernel_size[0] for side in features.grid]
        resized = F.interpolate(mask_logits, size=whole, mode="bilinear", align_corners=False)
        masks = relative.embed_masks(resized)
    blocks = clip.blocks()
    for number, block in enumerate(blocks, start=1):
        added = None if relative is None or masks is None else relative(number, x[:, 1:], masks)
        tokens = block(tokens, attn_mask=mask if added is None else mask + F.pad(added, (1, 0)), context=x)
        if number < len(blocks):  # nobody reads the last block's patches
            x = block(x)
    return F.normalize(clip.visual.ln_post(tokens) @ clip.visual.proj, dim=-1)


def stages(model: SAN, options: MaskTokenOptions, pixels: Tensor, text: TextClassifier) -> list[Stage]:
    """Return the method's work on one image, `pixels` [1, 3, H, W], by parts, without relative mask attention."""
    proposals = model.propose(pixels)
    return [
        Stage("proposals", lambda: model.propose(pixels)),
        Stage("CLIP, mask tokens", lambda: embed_masks(model, pixels, proposals.mask_logits, options)),
        Stage("classification", lambda: model.classify(proposals, text)),
    ]
