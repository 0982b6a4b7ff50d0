"""Transformer blocks of CLIP and of the side network.

Parameter names are open_clip's and timm's, whose weights these modules read and whose numbers they reproduce (tested);
the packages themselves are not imported, because that takes longer than labelling an image. The computation with
the weights is in `Block`, for training and inference, and for matrices of float32 or bfloat16: norms
and the residual sum stay in the input's precision, whatever the matrices' precision.
Letters: B batch, Q queries, N attention heads, L tokens, C channels, D channels of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK_GELU_SLOPE = 1.702

PACKED_FOR_ROWS = 512
"""Rows of the products for which oneDNN lays out a packed matrix; with others they are as right, and about as fast."""

CACHED_LOGITS = 2**20
"""Attention logits that a processor's cache holds in bfloat16 (2 MiB)."""


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


class Parts(NamedTuple):
    """A block's weights by their role."""

    heads: int
    attention_norm: nn.LayerNorm
    qkv_weight: Tensor
    """[3 C, C]: queries, keys, values; each head after head."""
    qkv_bias: Tensor
    """[3 C]."""
    attention_out: nn.Linear
    mlp_norm: nn.LayerNorm
    mlp_in: nn.Linear
    activation: nn.Module
    mlp_out: nn.Linear


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def parts(self) -> Parts:
        """Return the block's weights by their role."""
        raise NotImplementedError

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Let x [B, L, C] attend to `context` [B, M, C], or to itself; return the new x, [B, L, C].

        `attn_mask` [L, M], [N, L, M] or [B, N, L, M] is added to the attention logits.
        """
        if context is None:
            q, k, v = self._project(self.parts().attention_norm(x), 0, 3)
        else:
            (q,) = self._project(self.parts().attention_norm(x), 0, 1)
            k, v = self._project(self.parts().attention_norm(context), 1, 3)
        return self._finish(x, attention(q, k, v, attn_mask))

    def _project(self, x: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """Return (queries, keys, values)[first:end], each [B, N, L, D]."""
        parts, channels = self.parts(), x.shape[-1]
        rows = slice(first * channels, end * channels)
        weight = parts.qkv_weight
        if end - first < 3:
            weight = (weight.to_dense() if weight.is_mkldnn else weight)[rows]
        projected = linear(x, weight, parts.qkv_bias[rows])
        return projected.unflatten(2, (end - first, parts.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Apply the block's rest to the attention's result `attended` [B, N, L, D]: the output matrix, and the MLP."""
        parts = self.parts()
        out = parts.attention_out
        x = x + linear(attended.transpose(1, 2).flatten(2), out.weight, out.bias)
        normed = parts.mlp_norm(x)
        into, out = parts.mlp_in, parts.mlp_out
        if not isinstance(parts.activation, QuickGELU):
            return x + linear(parts.activation(linear(normed, into.weight, into.bias)), out.weight, out.bias)
        # With s = 1.702, s * quick_gelu(h) = silu(s h), so s goes in before the first matrix and out with the last sum:
        # one pass over the hidden channels where x * sigmoid(1.702 x) takes three.
        s = QUICK_GELU_SLOPE
        hidden = linear(s * normed, into.weight, s * into.bias, silu=True)
        return torch.add(x, linear(hidden, out.weight, s * out.bias), alpha=1 / s)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + mask) v; q [B, N, L, D], k and v [B, N, M, D], mask like [B, N, L, M]."""
    if mask is None and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.is_grad_enabled():
        return _narrow_attention(q, k, v)
    q, k, v = _for_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))


def _narrow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention in bfloat16 on a CPU, in blocks of rows that fit its cache; torch's takes 1.5 times as long.

    Subtracting one vector from all keys does not change the softmax: without their mean, logits are
    smaller and lose less when rounded.
    """
    q, v = (q * q.shape[-1] ** -0.5).contiguous(), v.contiguous()
    k = (k - k.mean(dim=2, keepdim=True)).contiguous().transpose(2, 3)
    batch, heads, length, channels = q.shape
    attended = q.new_empty(batch, length, heads, channels).transpose(1, 2)
    rows = max(1, CACHED_LOGITS // k.shape[3])
    for image in range(batch):
        for head in range(heads):
            for top in range(0, length, rows):
                weights = (q[image, head, top : top + rows] @ k[image, head]).softmax(dim=-1)
                attended[image, head, top : top + rows] = weights @ v[image, head]
    return attended


def steered_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Let Q tokens attend to L patches, each with its bias, and to themselves, not to each other or the class token.

    q [B, N, Q, D]; k and v [B, N, Q + 1 + L, D], the queries' own first; bias [B, N, Q, L]. Returns [B, N, Q, D].
    """
    q, k, v = _for_attention(q, k, v)
    queries = q.shape[2]
    weights = _steered_weights(q, k, bias).to(v.dtype)
    return weights[..., :1] * v[:, :, :queries] + weights[..., 1:] @ v[:, :, queries + 1 :]


def _steered_weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Return the attention's weights, [B, N, Q, 1 + L]: to itself, then to the patches; see `steered_attention`."""
    queries = q.shape[2]
    q = q * q.shape[-1] ** -0.5
    to_itself = (q * k[:, :, :queries]).sum(dim=-1, keepdim=True)
    to_patches = q @ k[:, :, queries + 1 :].transpose(-2, -1) + bias
    return torch.cat([to_itself, to_patches], dim=-1).softmax(dim=-1)


def _for_attention(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert bfloat16 to float32 on a CPU: outside `_narrow_attention` it would be slower, and less exact."""
    return tuple(t.float() if t.dtype == torch.bfloat16 and t.device.type == "cpu" else t for t in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> Tensor:
    """Compute x W^T + b, [..., in] -> [..., out], in a narrow weight's precision; with `silu`, x * sigmoid(x) of it.

    A weight that `pack` laid out for oneDNN serves inference only.
    """
    if weight.dtype == torch.bfloat16:
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    if weight.is_mkldnn or _multiplied_by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")
    projected = F.linear(x, weight, bias)
    return F.silu(projected) if silu else projected


def _multiplied_by_onednn(x: Tensor) -> bool:
    """Return whether to call oneDNN directly, for inference on a CPU: torch uses MKL for float32, 10 % slower."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_narrow_products()))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # oneDNN's call ignores autocast's number formats
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def pack(weight: Tensor) -> Tensor:
    """Lay a matrix [out, in] out as oneDNN multiplies by it on this processor, for `linear`; `to_dense` undoes it.

    Otherwise oneDNN lays it out anew in every product: for matrices of 1024 columns a fifth of the time.
    """
    if not torch.backends.mkldnn.is_available() or (weight.dtype == torch.bfloat16 and not _has_narrow_products()):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)


@cache
def _has_narrow_products() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this processor; with AVX2 alone it refuses, and torch does not."""
    return torch.cpu._is_avx512_supported()


class ClipBlock(Block):
    """CLIP's block; attention and MLP are stored as in open_clip, and not called."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def parts(self) -> Parts:
        attn, mlp = self.attn, self.mlp
        weights = (attn.num_heads, self.ln_1, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj)
        first, activation, last = mlp
        return Parts(*weights, self.ln_2, cast(nn.Linear, first), activation, cast(nn.Linear, last))

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        steering: Tensor | None = None,
        only_queries: bool = False,
    ) -> Tensor:
        """Run the block; with `steering` [B, N, Q, L], recognise proposals in x [B, Q + 1 + L, C] (paper, section 3.3).

        x is then Q SLS tokens, the class token and the patches. SLS tokens attend to the patches, with `steering` added
        to the logits, and to themselves; class token and patches attend to one another, exactly as in plain CLIP.
        `only_queries`: return only the SLS tokens, [B, Q, C], all that is needed of the last block.
        """
        if steering is None:
            return super().forward(x, attn_mask, context)
        queries = steering.shape[2]
        normed = self.ln_1(x)
        if only_queries:
            (q,) = self._project(normed[:, :queries], 0, 1)
            k, v = self._project(normed, 1, 3)
            return self._finish(x[:, :queries], steered_attention(q, k, v, steering))
        q, k, v = self._project(normed, 0, 3)
        steered = steered_attention(q[:, :, :queries], k, v, steering)
        plain = attention(*(t[:, :, queries:] for t in (q, k, v)))
        return self._finish(x, torch.cat([steered, plain], dim=2))

    def attended(self, x: Tensor, steering: Tensor) -> Tensor:
        """Return how much the SLS tokens of x [B, Q + 1 + L, C] attend to each patch, [B, N, Q, L]; see `forward`."""
        queries = steering.shape[2]
        q, k = _for_attention(*self._project(self.ln_1(x), 0, 2))
        return _steered_weights(q[:, :, :queries], k, steering)[..., 1:]

    def values_alone(self, x: Tensor, *, residual: bool) -> tuple[Tensor, Tensor]:
        """Return what the block makes of x [B, L, C] where every token sees itself alone, and the keys, both [B, L, C].

        Attention is then the value and output projections. Without `residual`, that is all: x is not added, and the MLP
        is left out.
        """
        parts = self.parts()
        keys, values = self._project(parts.attention_norm(x), 1, 3)
        keys_of_tokens = keys.transpose(1, 2).flatten(2)
        if residual:
            return self._finish(x, values), keys_of_tokens
        out = parts.attention_out
        return linear(values.transpose(1, 2).flatten(2), out.weight, out.bias), keys_of_tokens


class ClipBlocks(nn.Module):
    """A stack of CLIP's blocks."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads, mlp_ratio, activation) for _ in range(layers))


class SideAttention(nn.Module):
    """The weights of self-attention as timm holds them: one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class SideBlock(Block):
    """The side network's block: timm's ViT block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SideAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, width))

    def parts(self) -> Parts:
        attn, mlp = self.attn, self.mlp
        weights = (attn.heads, self.norm1, attn.qkv.weight, attn.qkv.bias, attn.proj)
        first, activation, last = mlp
        return Parts(*weights, self.norm2, cast(nn.Linear, first), activation, cast(nn.Linear, last))
