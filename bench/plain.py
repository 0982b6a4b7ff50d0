"""SAN computed in the official order, as the thing to be faster than: readable, unfused, nothing saved.

Written from a description of the official computation, on the same weights as `opensan.model.SAN`. Kept on purpose:

- attention in the side adapter materialised, softmax(q k^T) v, for all heads at once;
- the attention head's last layer makes heads * 256 channels for every pixel;
- recognition with one L x L mask per head, all tokens through all blocks, the last one included;
- masks resized to the padded image, cropped, resized to the photograph; scores as one K x H0 x W0 einsum; argmax;
- prompts padded to 77 positions, one template of all names a batch.

CLIP's own attention is torch's multi-head attention, which fuses, as it does for the official code with today's torch.
Letters: B batch, Q queries, K words, D embedding, N attention heads, L patches, C channels, h w stride-16 grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.images import prepare
from opensan.model import SAN
from opensan.structures import ImageSizes, Proposals
from opensan.text.encoder import tokenize

BLOCKED = -100.0


class PlainSAN:
    """Functions on the state of a SAN; shares its memory, so the SAN's float32 weights must stay as they are.

    Those that a segmenter laid out for oneDNN are copied.
    """

    def __init__(self, san: SAN) -> None:
        self.config = san.config
        weights = san.state_dict(keep_vars=True)
        self.weights = {name: w.to_dense() if w.is_mkldnn else w for name, w in weights.items()}

    def segment(self, image: np.ndarray, text: Tensor) -> Tensor:
        """Labels [H0, W0] int64 of a photograph [H0, W0, 3] uint8 RGB, asked with unit text rows [K, D]."""
        prepared = prepare(image, self.config.image)
        proposals = self.propose(prepared.pixels.unsqueeze(0))
        return self.label_map(proposals, text, prepared.sizes)

    def propose(self, pixels: Tensor, *, supervise: bool = False) -> Proposals:
        """As `SAN.propose`; with `supervise`, recognition runs once for every supervised block, as it does there."""
        kept, tokens, grid = self.shallow_clip(pixels)
        answers = []
        for masks, bias in self.side_adapter(pixels, kept, supervise=supervise):
            answers.append(Proposals(masks, self.recognise(tokens, bias, grid), bias))
        last = answers[-1]
        return Proposals(last.mask_logits, last.mask_embeddings, last.attention_bias, auxiliary=tuple(answers[:-1]))

    # CLIP

    def shallow_clip(self, pixels: Tensor) -> tuple[dict[int, Tensor], Tensor, tuple[int, int]]:
        """Patch maps [B, C, h, w] by CLIP layer; all tokens [B, 1 + L, C] after the last shallow one; CLIP's grid."""
        visual, config = "clip.visual.", self.config
        small = F.interpolate(pixels, scale_factor=config.clip_scale, mode="bilinear", align_corners=False)
        x = F.conv2d(small, self._w(visual + "conv1.weight"), stride=config.clip.vision.patch_size)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        table = self._w(visual + "positional_embedding")
        class_token = self._w(visual + "class_embedding").expand(len(x), 1, -1)
        position = torch.cat([table[:1], self._resized_table(table[1:], grid)])
        x = self._norm(torch.cat([class_token, x], dim=1) + position, visual + "ln_pre", 1e-5)
        kept = {0: self._patch_map(x[:, 1:], grid)}
        for layer in range(1, config.recognition_layer + 1):
            x = self._clip_block(x, f"{visual}transformer.resblocks.{layer - 1}.", config.clip.vision.heads)
            kept[layer] = self._patch_map(x[:, 1:], grid)
        return kept, x, grid

    def recognise(self, tokens: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unit mask embeddings [B, Q, D] from the shallow layers' tokens and the attention bias [B, N, Q, h, w]."""
        batch, heads, queries = bias.shape[:3]
        pooled = F.adaptive_max_pool2d(bias.flatten(0, 1), grid).flatten(2)
        length = queries + tokens.shape[1]
        mask = bias.new_zeros(batch * heads, length, length)
        mask[:, :, :queries] = BLOCKED
        mask[:, torch.arange(queries), torch.arange(queries)] = 0
        mask[:, :queries, queries] = BLOCKED
        mask[:, :queries, queries + 1 :] = pooled
        x = torch.cat([tokens[:, :1].repeat(1, queries, 1), tokens], dim=1)
        for layer in range(self.config.recognition_layer, self.config.clip.vision.layers):
            x = self._clip_block(x, f"clip.visual.transformer.resblocks.{layer}.", heads, mask)
        x = self._norm(x[:, :queries], "clip.visual.ln_post", 1e-5) @ self._w("clip.visual.proj")
        return F.normalize(x, dim=-1)

    def _clip_block(self, x: Tensor, name: str, heads: int, mask: Tensor | None = None) -> Tensor:
        x = x + self._clip_attention(self._norm(x, name + "ln_1", 1e-5), name + "attn.", heads, mask)
        hidden = self._linear(self._norm(x, name + "ln_2", 1e-5), name + "mlp.c_fc")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.config.clip.quick_gelu else F.gelu(hidden)
        return x + self._linear(hidden, name + "mlp.c_proj")

    def _clip_attention(self, x: Tensor, name: str, heads: int, mask: Tensor | None) -> Tensor:
        x = x.transpose(0, 1)
        names = ("in_proj_weight", "in_proj_bias")
        out_names = ("out_proj.weight", "out_proj.bias")
        attended, _ = F.multi_head_attention_forward(
            x, x, x, x.shape[2], heads, *(self._w(name + part) for part in names), None, None, False, 0.0,
            *(self._w(name + part) for part in out_names), training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        return attended.transpose(0, 1)

    # Side adapter

    def side_adapter(
        self, pixels: Tensor, kept: dict[int, Tensor], *, supervise: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Mask logits [B, Q, h, w] and attention bias [B, N, Q, h, w]: of all supervised blocks, or of the last."""
        config, side = self.config.side_adapter, "side_adapter."
        x = F.conv2d(
            pixels,
            self._w(side + "patch_embedding.weight"),
            self._w(side + "patch_embedding.bias"),
            stride=config.patch_size,
        )
        grid = (x.shape[2], x.shape[3])
        table = self._resized_table(self._w(side + "patch_position"), grid)
        position = torch.cat([self._w(side + "query_position"), table])
        queries = self._w(side + "query_embedding").expand(len(x), -1, -1)
        x = torch.cat([queries, x.flatten(2).transpose(1, 2)], dim=1) + position
        x = self._fuse(x, 0, kept, grid)
        answers = []
        for number in range(1, config.depth + 1):
            x = self._fuse(self._side_block(x, f"{side}blocks.{number - 1}."), number, kept, grid)
            if number == config.depth or (supervise and number in config.supervised_blocks):
                answers.append(self._heads(x[:, : config.queries], self._patch_map(x[:, config.queries :], grid)))
            if number < config.depth:
                x = x + position
        return answers

    def _side_block(self, x: Tensor, name: str) -> Tensor:
        x = x + self._side_attention(self._norm(x, name + "norm1", 1e-6), name + "attn.")
        hidden = F.gelu(self._linear(self._norm(x, name + "norm2", 1e-6), name + "mlp.fc1"))
        return x + self._linear(hidden, name + "mlp.fc2")

    def _side_attention(self, x: Tensor, name: str) -> Tensor:
        batch, length, width = x.shape
        heads = self.config.side_adapter.heads
        qkv = self._linear(x, name + "qkv").reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5
        attention = attention.softmax(dim=-1)
        return self._linear((attention @ v).transpose(1, 2).reshape(batch, length, width), name + "proj")

    def _fuse(self, x: Tensor, number: int, kept: dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        config = self.config.side_adapter
        if number not in config.fusion:
            return x
        name = f"side_adapter.fusion.{number}."
        maps = kept[config.fusion[number]]
        mean = maps.mean(dim=1, keepdim=True)
        variance = (maps - mean).pow(2).mean(dim=1, keepdim=True)
        maps = (maps - mean) / torch.sqrt(variance + 1e-6)
        weight, bias = self._w(name + "channel_norm.weight"), self._w(name + "channel_norm.bias")
        maps = self._conv(weight[:, None, None] * maps + bias[:, None, None], name + "projection")
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        patches = self._patch_map(x[:, config.queries :], grid) + maps
        return torch.cat([x[:, : config.queries], patches.flatten(2).transpose(1, 2)], dim=1)

    def _heads(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """queries [B, Q, C], patches [B, C, h, w]."""
        name, heads = "side_adapter.head.", self.config.clip.vision.heads
        q = self._mlp(queries, name + "query_mlp.", self._linear)
        pixels = self._mlp(patches, name + "pixel_mlp.", self._conv)
        attention = self._mlp(patches, name + "attention_mlp.", self._conv).unflatten(1, (heads, -1))
        masks = torch.einsum("bqc,bchw->bqhw", q, pixels)
        bias = torch.einsum("bqc,bnchw->bnqhw", q, attention)
        return masks, self._linear(bias.unsqueeze(-1), name + "bias_scale").squeeze(-1)

    def _mlp(self, x: Tensor, name: str, layer) -> Tensor:
        layers = self.config.side_adapter.mlp_layers
        for number in range(layers):
            x = layer(x, f"{name}layers.{number}")
            if number < layers - 1:
                x = F.relu(x)
        return x

    # Words

    def class_logits(self, mask_embeddings: Tensor, text: Tensor) -> Tensor:
        """[B, Q, K + 1] from unit embeddings [B, Q, D] and unit rows [K, D]."""
        rows = torch.cat([text, F.normalize(self._w("no_object_embedding"), dim=-1)])
        return torch.einsum("bqd,kd->bqk", mask_embeddings, self._w("clip.logit_scale").exp() * rows)

    def scores(self, proposals: Proposals, text: Tensor, sizes: ImageSizes) -> Tensor:
        """[K, H0, W0], of the first image."""
        masks = F.interpolate(proposals.mask_logits, size=sizes.padded, mode="bilinear", align_corners=False)
        masks = masks[:, :, : sizes.network[0], : sizes.network[1]]
        masks = F.interpolate(masks, size=sizes.image, mode="bilinear", align_corners=False)
        probabilities = self.class_logits(proposals.mask_embeddings, text).softmax(dim=-1)[0, :, :-1]
        return torch.einsum("qk,qhw->khw", probabilities, masks[0].sigmoid())

    def label_map(self, proposals: Proposals, text: Tensor, sizes: ImageSizes) -> Tensor:
        """[H0, W0] int64."""
        return self.scores(proposals, text, sizes).argmax(dim=0)

    def embed_names(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit rows [K, D]: one template of all names a batch, 77 positions each."""
        by_template = []
        for template in templates:
            prompts = [tokenize(template.format(name)) for name in names]
            tokens = torch.zeros(len(names), self.config.clip.text.context_length, dtype=torch.int64)
            for row, prompt in zip(tokens, prompts, strict=True):
                row[: len(prompt)] = torch.tensor(prompt)
            by_template.append(self.embed_prompts(tokens))
        return F.normalize(torch.stack(by_template).mean(dim=0), dim=-1)

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Unit embeddings [P, D] of tokens [P, 77]."""
        config = self.config.clip.text
        x = self._w("clip.token_embedding.weight")[tokens] + self._w("clip.positional_embedding")
        causal = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
        for layer in range(config.layers):
            x = self._clip_block(x, f"clip.transformer.resblocks.{layer}.", config.heads, causal)
        x = self._norm(x, "clip.ln_final", 1e-5)
        x = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self._w("clip.text_projection")
        return F.normalize(x, dim=-1)

    # Small things

    def _w(self, name: str) -> Tensor:
        return self.weights[name]

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._w(name + ".weight"), self._w(name + ".bias"), eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w(name + ".weight"), self._w(name + ".bias"))

    def _conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, self._w(name + ".weight")[:, :, None, None], self._w(name + ".bias"))

    @staticmethod
    def _patch_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, C] -> [B, C, h, w], laid out so."""
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous()

    @staticmethod
    def _resized_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
        side = round(len(table) ** 0.5)
        if grid == (side, side):
            return table
        square = table.T.reshape(1, -1, side, side)
        return F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2)[0].T
