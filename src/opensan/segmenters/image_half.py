"""Run the image half of a model exactly, or as fast as the machine can with nearly the same results.

"exact" is float32 on any device. The other two narrow matrix products, with measured effect on labels (docs/speed.md).
On a CPU that multiplies bfloat16, "fast" narrows the backbone's blocks and "fastest" the side network's too; on CUDA,
both are the same: everything in bfloat16.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensan.model import SAN
from opensan.model.mapped import Forget, keep
from opensan.model.transformer import Block, pack
from opensan.structures import Proposals

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MOST_GRAPHS = 16
"""Shapes of batches whose CUDA graphs are kept; each holds the memory of a forward pass."""

ImageHalf = Callable[[Tensor], Proposals]
"""Function from pixels [B, 3, H, W] float32 on the device to proposals, as `SAN.propose`."""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return the precision in which `device` multiplies matrices fastest. Warns if that is no faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    warnings.warn(
        'speeds "fast" and "fastest" are the same as "exact" here: no bfloat16 arithmetic in this processor',
        stacklevel=4,
    )
    return torch.float32


def prepare_image_half(
    model: SAN, device: torch.device, speed: str, dtype: torch.dtype, forget: Forget = keep
) -> ImageHalf:
    """Prepare `model`, on `device` for inference only; its weights change in place.

    `speed` is one of `choices.Speed`; `dtype` is that of the narrow blocks' matrices, that of
    `fastest_dtype` unless the user chose it. `forget` is called with the weights that another form replaced.
    """
    if device.type == "cuda" and speed != "exact":
        narrow_matrices(model, dtype)
        return CudaGraphs(_compiled(model, dtype))
    narrow_matrices(model, dtype, speed, forget)
    if device.type == "cpu":
        pack_matrices(model, forget)
    return model.propose


def narrow_matrices(model: SAN, dtype: torch.dtype, speed: str = "fastest", forget: Forget = keep) -> None:
    """Store the matrices of blocks in `dtype`: of the backbone's alone at "fast", else of both networks'.

    The side network's blocks lose most labels when they are narrow: what they round passes through every later block
    into the attention bias (bench/hard_labels.py).
    """
    narrow_blocks(model.clip.blocks() if speed == "fast" else model.blocks(), dtype, forget)


def narrow_blocks(blocks: Iterable[nn.Module], dtype: torch.dtype, forget: Forget = keep) -> None:
    """Store the matrices of transformer blocks in `dtype`: nearly all of the image half's arithmetic.

    Attention follows its queries and keys, so it is narrow too. Norms, residual sums, fusion and heads stay float32.
    """
    for block in blocks:
        if isinstance(block, Block):  # others can't compute with a precision other than their input's
            for parameter in block.parameters():
                if parameter.ndim == 2 and parameter.dtype != dtype:
                    wide = parameter.data
                    parameter.data = wide.to(dtype)
                    forget(wide)


def pack_matrices(model: SAN, forget: Forget = keep) -> None:
    """Replace the matrices of the transformer blocks by ones laid out as oneDNN multiplies by them."""
    last = model.clip.blocks()[-1]
    for block in model.blocks():
        if isinstance(block, Block):
            for module in block.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim == 2 and not (block is last and parameter is block.parts().qkv_weight):
                        setattr(module, name, nn.Parameter(pack(parameter.data), requires_grad=False))
                        forget(parameter.data)


def _compiled(model: SAN, dtype: torch.dtype) -> ImageHalf:
    """Return `model.propose` with compiled parts; for a `dtype` of bfloat16, the other matrix products use it too.

    The parts are compiled, not the whole, which takes minutes: there are four kinds of block, the fusion and the heads,
    and each is compiled for all shapes. torch keeps what it compiled in the user's temporary folder.
    """
    side = model.side_adapter
    for part in (*model.blocks(), *side.fusion.values(), side.head):
        part.compile(dynamic=True)

    def propose(pixels: Tensor) -> Proposals:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            return model.propose(pixels)

    return propose


class CudaGraphs:
    """A function of pixels, recorded once for each shape and replayed, because launches slow a small batch down.

    Threads may share it; they take turns.
    """

    def __init__(self, function: ImageHalf) -> None:
        self._function = function
        self._graphs: OrderedDict[torch.Size, _Recorded] = OrderedDict()
        self._turn = threading.Lock()

    def __call__(self, pixels: Tensor) -> Proposals:
        with self._turn:
            recorded = self._graphs.pop(pixels.shape, None) or _Recorded.of(self._function, pixels)
            self._graphs[pixels.shape] = recorded
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            recorded.pixels.copy_(pixels)
            recorded.graph.replay()
            proposals = recorded.proposals
            return Proposals(proposals.mask_logits.clone(), proposals.mask_embeddings.clone())


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    """The input of the graph."""
    proposals: Proposals
    """The output of the graph."""

    @classmethod
    def of(cls, function: ImageHalf, pixels: Tensor) -> "_Recorded":
        pixels = pixels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and libraries allocate their memory: neither can be recorded
                function(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may continue: the default mode forbids them to allocate memory while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            proposals = function(pixels)
        return cls(graph, pixels, proposals)
