"""How the image half of a model is computed: exactly, or as fast as the machine can with nearly the same answers.

"exact" is float32, whatever the device. "fast" is what the device does best, measured for what it costs in answers
(docs/speed.md): on a CPU, the matrix products of both ViTs' blocks in bfloat16, where the CPU multiplies that.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensan.model import SAN
from opensan.model.transformer import Block
from opensan.structures import Proposals

SPEEDS = ("exact", "fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MOST_GRAPHS = 16
"""Shapes of batches whose CUDA graphs are kept; each holds the memory of a forward pass."""

ImageHalf = Callable[[Tensor], Proposals]
"""Pixels [B, 3, H, W] float32 on the device, as for `SAN.propose`, to what that answers."""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The precision in which `device` multiplies matrices fastest. Warns if that is no faster than "exact"."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    warnings.warn('speed "fast" is the same as "exact" here: no bfloat16 arithmetic in this processor', stacklevel=4)
    return torch.float32


def prepare_image_half(model: SAN, device: torch.device, speed: str, dtype: torch.dtype) -> ImageHalf:
    """Make `model`, which lies on `device` for inference only, ready; its weights change in place.

    `speed` is one of SPEEDS; `dtype` is that of the blocks' matrices, for "fast" what `fastest_dtype` says.
    """
    narrow_matrices(model, dtype)
    if device.type == "cuda" and speed == "fast":
        return CudaGraphs(_compiled(model, dtype))
    return model.propose


def narrow_matrices(model: SAN, dtype: torch.dtype) -> None:
    """Hold the matrices of both ViTs' blocks in `dtype`: nearly all of the image half's arithmetic.

    Attention follows its queries and keys, so it is narrow too. Norms, residual sums, fusion and heads stay in float32.
    """
    for block in model.blocks():
        if isinstance(block, Block):  # which computes in the precision of its matrices; others would refuse
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.to(dtype)


def _compiled(model: SAN, dtype: torch.dtype) -> ImageHalf:
    """`model.propose` with compiled parts; with bfloat16 for `dtype`, also in what is left of the matrix products.

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
    """A function of pixels, recorded once for each shape and replayed: a small batch waits for launches otherwise.

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
            found = recorded.proposals
            return Proposals(found.mask_logits.clone(), found.mask_embeddings.clone())


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    """What the graph reads."""
    proposals: Proposals
    """What it writes."""

    @classmethod
    def of(cls, function: ImageHalf, pixels: Tensor) -> "_Recorded":
        pixels = pixels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries take their memory: neither can be recorded
                function(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: the mode that is usual forbids them to take memory as long as this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            proposals = function(pixels)
        return cls(graph, pixels, proposals)
